"""The controller program: the client API, the workers' steering streams and the operator's API."""

"""Generated protobuf and gRPC stubs of the kvpilot.v1 API."""

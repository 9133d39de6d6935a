"""The worker process: runs the model and each request's cache pipeline."""

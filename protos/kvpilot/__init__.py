"""kvpilot's public Python face."""

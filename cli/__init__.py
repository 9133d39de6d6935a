"""The kvpilot command."""

"""Stages for kvpilot, each a file."""

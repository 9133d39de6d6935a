"""Stages that choose how the rest is stored."""

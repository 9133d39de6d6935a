"""Stages that choose which tokens stay."""

"""Continuous batching over transformers' model code."""

"""Benchmarks: each prints the machine, the peer and us in one run."""

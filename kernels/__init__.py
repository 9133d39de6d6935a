"""Decode attention over mixed-format blocks and block conversion, behind one interface: see ``kernels.api``."""

__version__ = "0.0.0"

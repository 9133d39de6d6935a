"""Stages that choose where blocks live."""

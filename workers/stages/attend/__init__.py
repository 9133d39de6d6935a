"""Stages that choose what a query reads."""

"""Shared by the tests of this folder."""

from tests.e2e.conftest import anyio_backend, tiny_folder

__all__ = ["anyio_backend", "tiny_folder"]

"""Two models to ask."""

from tests.engines import nano_engine, tiny_engine

__all__ = ["nano_engine", "tiny_engine"]

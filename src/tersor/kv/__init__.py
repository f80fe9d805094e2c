"""Tokens of keys or values, encoded once, block by block; knows no models."""

from tersor.kv.stream import Stream, matrices

__all__ = ["Stream", "matrices"]

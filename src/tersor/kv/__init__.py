"""Tokens of keys or values, encoded once, block by block; knows no models."""

from tersor.kv.stream import TokenStream, matrices, meet_as_signs

__all__ = ["TokenStream", "matrices", "meet_as_signs"]

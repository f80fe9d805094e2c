"""Tokens of keys or values, encoded once, block by block; knows no models."""

from tersor.kv.read import lie_for_kernels, meet_as_signs
from tersor.kv.stream import TokenStream, matrices

__all__ = ["TokenStream", "lie_for_kernels", "matrices", "meet_as_signs"]

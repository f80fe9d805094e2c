"""Tokens of keys or values, encoded once, block by block; knows no models."""

from tersor.kv.read import lie_for_kernels, meet_as_signs
from tersor.kv.stream import TokenStream, matrices
from tersor.kv.together import append_together

__all__ = ["TokenStream", "append_together", "lie_for_kernels", "matrices", "meet_as_signs"]

"""Codecs, one file each."""

from tersor.codecs.additive import Sum
from tersor.codecs.dense import Dense
from tersor.codecs.rotated import Rotated
from tersor.codecs.rows import MixedRows
from tersor.codecs.scalar import Scalar
from tersor.codecs.uniform import Uniform

BUILT_IN = (Dense, Uniform, Scalar, Rotated, Sum, MixedRows)

__all__ = ["BUILT_IN", "Dense", "MixedRows", "Rotated", "Scalar", "Sum", "Uniform"]

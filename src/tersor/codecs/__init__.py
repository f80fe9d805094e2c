"""Codecs, one file each."""

from tersor.codecs.additive import Sum
from tersor.codecs.allocated import Allocated
from tersor.codecs.dense import Dense
from tersor.codecs.interpolative import Interpolative
from tersor.codecs.kashin import Kashin
from tersor.codecs.klt import Klt
from tersor.codecs.learned_rotation import LearnedRotation
from tersor.codecs.low_rank import LowRank
from tersor.codecs.minmax import MinMax
from tersor.codecs.product import Product
from tersor.codecs.rotated import Rotated
from tersor.codecs.rows import MixedRows
from tersor.codecs.scalar import Scalar
from tersor.codecs.shifted import Shifted
from tersor.codecs.standardized import Standardized
from tersor.codecs.swap import Swap
from tersor.codecs.symmetric import Symmetric
from tersor.codecs.two_basis import TwoBasis
from tersor.codecs.uniform import Uniform

BUILT_IN = (Dense, Uniform, Scalar, Rotated, Sum, MixedRows, Product, Swap, LearnedRotation, Standardized, Symmetric,
            Kashin, TwoBasis, MinMax, Shifted, LowRank, Allocated, Klt, Interpolative)

__all__ = ["Allocated", "BUILT_IN", "Dense", "Interpolative", "Kashin", "Klt", "LearnedRotation", "LowRank", "MinMax",
           "MixedRows", "Product", "Rotated", "Scalar", "Shifted", "Standardized", "Sum", "Swap", "Symmetric",
           "TwoBasis", "Uniform"]

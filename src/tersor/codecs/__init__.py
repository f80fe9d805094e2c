"""Codecs, one file each."""

from tersor.codecs.bases.kashin import Kashin
from tersor.codecs.bases.two_basis import TwoBasis
from tersor.codecs.combined.rows import MixedRows
from tersor.codecs.combined.sum import Sum
from tersor.codecs.low_rank.allocated import Allocated
from tersor.codecs.low_rank.interpolative import Interpolative
from tersor.codecs.low_rank.low_rank import LowRank
from tersor.codecs.scalar.dense import Dense
from tersor.codecs.scalar.lloyd_max import Scalar
from tersor.codecs.scalar.minmax import MinMax
from tersor.codecs.scalar.uniform import Uniform
from tersor.codecs.transforms.bounded import Bounded
from tersor.codecs.transforms.centered import Centered
from tersor.codecs.transforms.learned_rotation import LearnedRotation
from tersor.codecs.transforms.rotated import Rotated
from tersor.codecs.transforms.shifted import Shifted
from tersor.codecs.transforms.standardized import Standardized
from tersor.codecs.transforms.swap import Swap
from tersor.codecs.trellis.folded import FoldedTrellis
from tersor.codecs.trellis.spectral import SpectralTrellis
from tersor.codecs.trellis.trellis import Trellis
from tersor.codecs.vector.klt import Klt
from tersor.codecs.vector.product import Product
from tersor.codecs.vector.residual import Residual
from tersor.codecs.vector.symmetric import Symmetric

BUILT_IN = (Dense, Uniform, Scalar, Rotated, Sum, MixedRows, Product, Swap, LearnedRotation, Standardized, Symmetric,
            Kashin, TwoBasis, MinMax, Shifted, LowRank, Allocated, Klt, Interpolative, Trellis, FoldedTrellis, Centered,
            Residual, SpectralTrellis, Bounded)

__all__ = ["Allocated", "BUILT_IN", "Bounded", "Centered", "Dense", "FoldedTrellis", "Interpolative", "Kashin", "Klt",
           "LearnedRotation", "LowRank", "MinMax", "MixedRows", "Product", "Residual", "Rotated", "Scalar", "Shifted",
           "SpectralTrellis", "Standardized", "Sum", "Swap", "Symmetric", "Trellis", "TwoBasis", "Uniform"]

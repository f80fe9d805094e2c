"""Which products are taken, and how they are cut: configurations as data."""

from tersor.ops.trellis_product.shapes import one as one
from tersor.ops.trellis_product.shapes import several as several

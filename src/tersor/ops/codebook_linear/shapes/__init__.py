"""Which products are taken, and how they are cut: configurations as data."""

from tersor.ops.codebook_linear.shapes import few as few
from tersor.ops.codebook_linear.shapes import limits as limits
from tersor.ops.codebook_linear.shapes import many as many
from tersor.ops.codebook_linear.shapes import one as one

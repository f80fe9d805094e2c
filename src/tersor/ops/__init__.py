"""Operations with a kernel for CUDA: each folder holds the meaning in plain torch and the Triton kernel."""

from tersor.ops.dispatch import reference_only as reference_only

"""Operations with a kernel for CUDA: each folder holds the meaning in plain torch and the kernel.

In a folder: `__init__.py` is the op, `reference.py` its meaning, `launch` the host's side, `kernels` the device's,
`shapes` what kernels take and how work is divided. Imports go that way only: see README.md.
"""

from tersor.ops.dispatch import reference_only as reference_only

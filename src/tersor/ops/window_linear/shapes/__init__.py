"""What kernels take, and how they divide it: `lanes` for the processor, `tables` for CUDA."""

from tersor.ops.window_linear.shapes import lanes, tables

__all__ = ["lanes", "tables"]

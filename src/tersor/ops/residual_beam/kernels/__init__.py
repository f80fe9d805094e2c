"""Kernels of the beam."""

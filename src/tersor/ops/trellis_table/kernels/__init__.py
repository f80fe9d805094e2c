"""Kernels: compiled by numba."""

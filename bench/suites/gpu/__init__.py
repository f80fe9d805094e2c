"""Tersor on a GPU: products with one matrix, an 8B-shaped model, its encoding, logits; what configurations cost."""

from bench.suite import Suite, deferred
from bench.suites.gpu import cases, tables, tiling_cases

SUITES = (
    Suite("gpu", "products, Hadamard transforms, tokens a second, encoding, logits beside bf16, int4, NF4; docs/gpu.md",
          cases.cases, deferred("bench.suites.gpu.measure"), tables.TABLES, ("transformers",)),
    Suite("gpu_profile", "the kernels that products launch", cases.profiles,
          deferred("bench.suites.gpu.measure"), needs=("triton",)),
    Suite("gpu_tilings", "what ops/codebook_linear/shapes were chosen from: configurations alone, and in a layer",
          tiling_cases.cases, deferred("bench.suites.gpu.tilings"), needs=("triton",)),
)

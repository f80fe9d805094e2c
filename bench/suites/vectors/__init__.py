"""Vector sets beside FAISS."""

from bench.suite import Suite, always, deferred
from bench.suites.vectors import cases, tables

SUITES = (
    Suite("vectors", "recall, error and speed of vector sets at equal bytes, beside FAISS",
          always((*cases.CASES, *cases.MILLION, *cases.SINGLE)), deferred("bench.suites.vectors.measure"),
          tables.TABLES, ("faiss", "transformers")),
    Suite("vectors_gpu", "queries a second of vector sets on a GPU, beside a dense product of torch",
          always(cases.ON_GPU), deferred("bench.suites.vectors.on_gpu"), tables.ON_GPU, ("triton",)),
)

"""Vector sets beside FAISS."""

from bench.suite import Suite, always, deferred
from bench.suites.vectors import cases, tables

SUITES = (
    Suite("vectors", "recall, error and speed of vector sets at equal bytes, beside FAISS",
          always((*cases.CASES, *cases.MILLION, *cases.SINGLE)), deferred("bench.suites.vectors.measure"),
          tables.TABLES, ("faiss", "transformers")),
)

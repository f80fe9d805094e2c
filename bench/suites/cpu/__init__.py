"""Products on the processor, on one thread, beside torch's dense ones."""

from bench.suite import Suite, always, deferred
from bench.suites.cpu import cases, tables

SUITES = (
    Suite("cpu_product", "products with 4096 x 4096 codes beside dense float32 and bf16, one thread; 3 minutes",
          always(cases.CASES), deferred("bench.suites.cpu.measure"), tables.TABLES, needs=("numba",)),
)

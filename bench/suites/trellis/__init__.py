"""Linear trellis codes: the error of every packaged filter."""

from bench.suite import Suite, always, deferred
from bench.suites.trellis import cases, tables

SUITES = (
    Suite("trellis", "error of every packaged filter on a Gaussian matrix, by the public call; 5 minutes",
          always(cases.CASES), deferred("bench.suites.trellis.measure"), tables.TABLES),
)

"""Linear trellis codes: the error of every packaged filter, beside peers, on heads and on real matrices."""

from bench.suite import Suite, always, deferred
from bench.suites.trellis import cases, tables

SUITES = (
    Suite("trellis", "error of every packaged filter, and of peers; of heads, of real matrices; 20 minutes",
          always(cases.CASES), deferred("bench.suites.trellis.measure"), tables.TABLES),
)

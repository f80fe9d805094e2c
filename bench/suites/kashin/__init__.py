"""Kashin quantization: do the published forms reproduce, beside the control that the paper lacked."""

from bench.suite import Suite, deferred, sections
from bench.suites.kashin import tables

SUITES = (
    Suite("kashin", "the published forms beside rotation + Lloyd-Max at equal bits",
          sections("errors", "separate", "matrix", "steps"), deferred("bench.suites.kashin.reproduction"),
          tables.TABLES),
)

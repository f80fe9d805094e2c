"""Recovery beside what it begins with, and beside a published system."""

from bench.suite import Suite, deferred
from bench.suites.recovery import cases, tables

SUITES = (
    Suite("recovery", "KL of four texts and BLiMP of models without recovery, with scales trained, and with all of it; "
                      "5 to 20 minutes of two cores a case",
          cases.of, deferred("bench.suites.recovery.measure"), tables.TABLES, ("transformers",)),
)

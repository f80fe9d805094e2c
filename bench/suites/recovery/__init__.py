"""Recovery beside what it begins with."""

from bench.suite import Suite, always, deferred
from bench.suites.recovery import cases, tables

SUITES = (
    Suite("recovery", "KL of four texts and BLiMP of models without recovery, with scales trained, and with all of it; "
                      "5 to 20 minutes of two cores a case",
          always(cases.CASES), deferred("bench.suites.recovery.measure"), tables.TABLES, ("transformers",)),
)

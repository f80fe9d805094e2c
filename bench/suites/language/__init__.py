"""Language models at equal bytes."""

from bench.suite import Suite, always, deferred
from bench.suites.language import cases, tables

SUITES = (
    Suite("models", "perplexity, KL, top-1 beside peers of as many bytes; 45 minutes of one core a fable model",
          always(cases.MODEL_CASES), deferred("bench.suites.language.measure"), tables.TABLES, ("transformers",)),
)

"""Sentence embeddings as whole matrices."""

from bench.suite import Suite, always, deferred
from bench.suites.embeddings import cases, tables

SUITES = (
    Suite("embeddings", "what 3 nearest neighbours make of compressed embeddings; 1 minute", always(cases.CASES),
          deferred("bench.suites.embeddings.measure"), tables.TABLES, ("transformers",)),
)

"""LLM-ROM on language models."""

from bench.suite import Suite, always, deferred
from bench.suites.rom import cases, tables

SUITES = (
    Suite("rom", "the ladder from plain SVD to rom_plus, equal bytes, cost; 2 minutes a case of fable-22m",
          always(cases.CASES), deferred("bench.suites.rom.measure"), tables.TABLES, ("transformers",)),
)

"""Adapters trained beside encoded weights and beside dense ones."""

from bench.suite import Suite, always, deferred
from bench.suites.adapters import cases, tables

SUITES = (
    Suite("adapters", "LoRA by transformers' Trainer on dense and compressed models; a minute a case of fable-7m",
          always(cases.CASES), deferred("bench.suites.adapters.measure"), tables.TABLES,
          ("transformers", "peft", "accelerate")),
)

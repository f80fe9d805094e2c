"""Low-rank codes: LPLR's reproduction, `lplr_plus`, layers of models, low rank beside a backbone."""

from bench.suite import Suite, always, deferred, sections
from bench.suites.low_rank import cases, reproduction_tables, tables

SUITES = (
    Suite("lplr", "the released LPLR: 98 settings and the phantom", sections("configurations", "phantom"),
          deferred("bench.suites.low_rank.reproduction"), reproduction_tables.TABLES),
    Suite("lplr_plus", "the ladder of improvements, some minutes; time; growth", always(cases.PLUS),
          deferred("bench.suites.low_rank.plus"), tables.PLUS),
    Suite("low_rank_layers", "every 8th or 16th linear layer of two models at 4 bits", always(cases.LAYERS),
          deferred("bench.suites.low_rank.layers"), tables.LAYERS, ("transformers",)),
    Suite("low_rank_models", "a low-rank part beside a quantized backbone", always(cases.MODELS),
          deferred("bench.suites.low_rank.models"), tables.MODELS, ("transformers",)),
)

"""Files that others serve: GGUF for llama.cpp, packed integers for vLLM, beside peers that saw the same calibration."""

from bench.suite import Suite, always, deferred
from bench.suites.serving import cases, tables

SUITES = (
    Suite("gguf", "KL of .gguf files at the sizes of ggml's types; 2 minutes of one core a case",
          always(cases.GGUF), deferred("bench.suites.serving.measure"), tables.GGUF,
          ("transformers", "gguf")),
    Suite("packed", "KL of compressed-tensors at peers' bits; 3 minutes of one core a case",
          always(cases.PACKED), deferred("bench.suites.serving.measure"), tables.PACKED,
          ("transformers",)),
    Suite("shards", "memory of .gguf from shards, 8B shape; 6 minutes of one core for 1 block, an hour for 32",
          always(cases.SHARDS), deferred("bench.suites.serving.shards"), tables.SHARDS,
          ("transformers", "gguf")),
)

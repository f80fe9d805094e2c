"""KV caches: in models, codecs alone, on a GPU."""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.suite import Asked, Outcome, Suite, Unmeasured, always, deferred
from bench.suites.kv import cases, codec_cases, gpu_cases, gpu_tables, tables


def measure(chosen: Sequence[Any], asked: Asked) -> Iterator[Outcome]:
    """Yield quality after long prompts, planted keys, and speed."""
    from bench.suites.kv.methods import available  # needs transformers

    here = [case for case in chosen if available(cases.method_of(case))]
    yield from (Unmeasured(case.key, "its package is not installed") for case in chosen if case not in here)
    for kind, module in ((cases.Quality, "quality"), (cases.Needle, "needle"), (cases.Speed, "speed")):
        own = [case for case in here if isinstance(case, kind)]
        if own:
            yield from deferred(f"bench.suites.kv.{module}")(own, asked)


SUITES = (
    Suite("kv", "quality after long prompts, planted keys, decoding speed beside QuantizedCache; hours",
          always(cases.cases()), measure, tables.TABLES, ("transformers",)),
    Suite("kv_long", "SmolLM2 with plans on three windows, three windows a text, planted keys in up to 8,100 tokens; "
          "minutes on a GPU (--device cuda)", always(cases.long_cases()), measure, tables.LONG, ("transformers",)),
    Suite("kv_codecs", "codecs on keys and values of SmolLM2 alone", always(codec_cases.cases()),
          deferred("bench.suites.kv.codecs"), needs=("transformers",)),
    Suite("kv_gpu", "decoding after 8k and 32k tokens on a GPU beside quanto's cache", gpu_cases.cases,
          deferred("bench.suites.kv.gpu"), gpu_tables.TABLES, ("transformers",)),
    Suite("kv_attention", "attention of one token over codes, alone, on a GPU beside dense attention",
          gpu_cases.attending, deferred("bench.suites.kv.gpu_attention"), gpu_tables.ATTENTION),
    Suite("kv_generate", "generate of an 8B-shaped model after 8k and 32k tokens on a GPU, by caches; minutes",
          gpu_cases.generating, deferred("bench.suites.kv.gpu_generate"), gpu_tables.GENERATING, ("transformers",)),
    Suite("kv_attention_cpu", "attention of one token over codes, one thread, beside dense attention; 2 minutes",
          always(gpu_cases.ON_PROCESSOR), deferred("bench.suites.kv.cpu_attention"), gpu_tables.ON_PROCESSOR,
          ("transformers", "numba")),
)

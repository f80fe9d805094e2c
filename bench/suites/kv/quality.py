"""KV caches in models: quality after a long prompt, a planted key, decoding speed. Results: results/kv.jsonl.

`python bench/kv.py choose --model fable-22m` trains tables and makes plans on calibration text, once; then `quality`
(with `--dear` the methods that encode slowly), `needle` and `speed`; one thread. The prompt is read densely in one
call, once for all methods; then its keys and values go to each method's cache, as that call would have handed them
over. The continuation is given 64 tokens a call, so that caches close blocks and quantize anew as when decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

import common
import evaluate_dense
import kv_methods
import kv_models
from kv_methods import Method
from tersor.errors import TersorError


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one window of one text."""

    model: str
    method: str
    kind: str
    bits: float
    window: str
    setting: str

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"quality|{self.model}|{self.method}@{self.bits:g}|{self.window}"


def continue_(model: Any, cache: Cache, ids: Tensor) -> Tensor:
    """Return the logits of a continuation, read in chunks, (1, tokens, vocabulary)."""
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits
                      for part in ids.split(kv_models.CHUNK, 1)], 1).float()


def run_quality(model_name: str, chosen: str, *, dear: bool, again: bool) -> None:
    setup = kv_models.SETUPS[model_name]
    model, _ = kv_models.load(model_name)
    methods = [m for m in (kv_methods.dear() if dear else kv_methods.cheap()) if re.search(chosen, m.name)]
    done = common.newest("kv")
    for window, ids in kv_models.held_out(setup):
        prompt, rest = ids[:, : setup.prompt], ids[:, setup.prompt :]
        dense = reference = None
        for method in methods:
            case = Case(model_name, method.name, method.kind, method.bits, window, "")
            if case.key in done and not again:
                continue
            if dense is None or reference is None:
                dense = kv_models.read(model, prompt)
                logits = continue_(model, kv_methods.twin(dense), rest)
                reference = evaluate_dense.Reference.of(logits[:, :-1])
            try:
                _quality(case, method, (model, dense, reference), rest)
            except (TersorError, RuntimeError, ValueError) as error:
                print(f"{case.key}: {type(error).__name__}: {error}", flush=True)


def _quality(case: Case, method: Method, given: tuple[Any, Any, evaluate_dense.Reference], rest: Tensor) -> None:
    model, dense, reference = given
    start = time.perf_counter()
    cache = kv_methods.empty(method, model, case.model)
    setting = "" if method.kind != "qet" else kv_methods.published(
        model.config.num_key_value_heads * kv_models.BLOCK, model.config.head_dim, method.bits)
    kv_methods.fill(cache, dense)
    seconds = time.perf_counter() - start
    held = kv_methods.held(cache)
    logits = continue_(model, cache, rest)
    after = kv_methods.held(cache)
    sums = evaluate_dense._sums(logits[:, :-1], rest[:, 1:], reference)
    elements = max(1, held["elements"])
    numbers = {**sums.numbers(), "predictions": sums.predictions, "loss": sums.loss, "divergence": sums.divergence,
               "agreed": sums.agreed, "rate": 8 * held["payload"] / elements, "rate_half": 8 * held["half"] / elements,
               "rate_tables": 8 * (held["half"] + held["tables"]) / elements, "held": held, "after": after,
               "encode_s": seconds}
    case = dataclasses.replace(case, setting=setting)
    nbytes = sum(value for name, value in held.items() if name in ("payload", "tables", "recent", "sinks"))
    common.record("kv", case, seed=kv_models.SEED, nbytes=nbytes, numbers=numbers)
    print(f"{case.key:58} bits {numbers['rate_half']:.3f} ({numbers['rate_tables']:.3f})  KL {numbers['kl']:.5f}  "
          f"top1 {numbers['top1']:.3f}  ppl {numbers['perplexity']:.3f}  {seconds:.1f} s {setting}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("choose", "quality", "needle", "speed"))
    parser.add_argument("--model", default="fable-22m", choices=sorted(kv_models.SETUPS))
    parser.add_argument("--only", default="", help="a regular expression found in a method's name")
    parser.add_argument("--dear", action="store_true", help="methods that encode slowly")
    parser.add_argument("--again", action="store_true", help="measure again what there is")
    arguments = parser.parse_args()
    with common.threads(1), torch.no_grad():
        if arguments.what == "choose":
            kv_models.choose(arguments.model)
        elif arguments.what == "quality":
            run_quality(arguments.model, arguments.only, dear=arguments.dear, again=arguments.again)
        elif arguments.what == "needle":
            import kv_needle

            kv_needle.run(arguments.only)
        else:
            import kv_speed

            kv_speed.run(arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables of caches on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.kv.gpu_cases import DENSE

CACHES = {"none": "dense", "static": "dense, static", "klt": "**Tersor** `klt` at {} bits",
          "quanto": "`QuantizedCache`, quanto {}-bit, axes 0/0"}
GENERATED = {"dynamic": "dense, `DynamicCache`", "static": "dense, static", "quanto": CACHES["quanto"],
             "hqq": "`QuantizedCache`, HQQ {}-bit, axes 0/0"}


def kv(found: Mapping[str, Line]) -> str:
    """Decoding with caches on a GPU; lines with cuDNN's attention only where there are no others."""
    body = []
    timed = [line for line in found.values() if not line["case"]["profile"]]
    timed = [line for line in timed if not line["case"]["cudnn"]] or timed
    ordered = sorted(timed, key=lambda line: line["case"]["tokens"])
    totals = {(line["case"]["method"], line["case"]["tokens"]): _total(line)
              for line in reversed(ordered) if not line["numbers"]["red"]}
    for line in ordered:
        case, numbers = line["case"], line["numbers"]
        kind, _, bits = case["method"].partition(":")
        name = CACHES.get(kind, f"**Tersor** `{case['method']}`").format(bits)
        rate = f"{numbers['rate']:.2f}" if numbers["rate"] else "16"
        start = [str(case["tokens"]), name, case["attention"], rate, f"{line['bytes'] / 1e6:.0f}"]
        if numbers["red"]:
            body.append([*start, "**wrong**", *[""] * 6])
            continue
        total = _total(line)
        ratios = [f"{totals[other, case['tokens']] / total:.2f}" if (other, case["tokens"]) in totals else ""
                  for other in ("none", "quanto:4", "quanto:2")]
        profile = found.get(line["key"].replace("gpu|", "gpuprofile|"))
        kernels = f"{profile['numbers']['kernels_ms']:.2f}" if profile else ""
        extra = f"{numbers['extra'] / 1e6:.0f}" if "extra" in numbers else ""
        body.append([*start, f"{numbers['step_ms']:.2f}", kernels, f"{numbers['encode_ms']:.2f}", *ratios, extra])
    return table(["tokens", "cache", "attention", "bits an element", "cache, MB", "ms a step", "of it kernels",
                   "ms a token for encoding", "tokens/s, x dense", "x quanto 4-bit", "x quanto 2-bit",
                   "a step's extra memory, MB"], body)


def _total(line: Line) -> float:
    """Return milliseconds a token, encoding included."""
    return line["numbers"]["step_ms"] + line["numbers"]["encode_ms"]


def attention(found: Mapping[str, Line]) -> str:
    """Attention alone, a line for each codec, columns by sequences and tokens: microseconds, and times dense."""
    places = sorted({(line["case"]["batch"], line["case"]["tokens"]) for line in found.values()})
    by_case = {(line["case"]["method"], line["case"]["batch"], line["case"]["tokens"]): line["numbers"]
               for line in found.values()}
    body = []
    for method in dict.fromkeys(line["case"]["method"] for line in found.values()):
        cells = []
        for place in places:
            numbers = by_case.get((method, *place), {})
            ratio = f" ({numbers['x_dense']:.2f})" if "x_dense" in numbers else ""
            timed = f"{numbers['us']:.1f}{ratio}" if "us" in numbers else ""
            cells.append("**wrong**" if numbers.get("red") else timed)
        kind, _, bits = method.partition(":")
        known = {**GENERATED, "none": "dense, bf16"}.get(kind, f"`{method}`")
        body.append([known.format(bits), *cells])
    return table(["cache", *(f"{batch} x {tokens:,}" for batch, tokens in places)], body)


def generating(found: Mapping[str, Line]) -> str:
    """`generate` of a whole model, a line for its weights and cache, columns by the prompt's tokens."""
    lengths = sorted({line["case"]["tokens"] for line in found.values()})
    by_case = {(line["case"]["weights"], line["case"]["cache"], line["case"]["tokens"]): line
               for line in found.values()}
    body = []
    for weights, cache in sorted({(weights, cache) for weights, cache, _ in by_case}, key=_order):
        lines = {tokens: by_case.get((weights, cache, tokens)) for tokens in lengths}
        cells = [_cell(line, name, form) for name, form in COLUMNS.values() for line in lines.values()]
        kind, _, bits = cache.partition(":")
        name = GENERATED.get(kind, f"**Tersor** `{cache}`").format(bits)
        verdicts = [line["numbers"]["passed"] for line in lines.values() if line and "passed" in line["numbers"]]
        body.append([f"`{weights}`", name, *cells, verdict(all(verdicts) if verdicts else None)])
    return table(["weights", "cache", *(f"{column}, {tokens:,}" for column in COLUMNS for tokens in lengths), "asked"],
                 body)


COLUMNS = {"ms a token": ("ms_token", "{:.2f}"), "tokens/s, x `DynamicCache`": ("x_dynamic", "{:.2f}"),
           "x static": ("x_static", "{:.2f}"), "prompt, s": ("prefill_s", "{:.2f}"),
           "of it for encoding": ("encode_share", "{:.1%}"), "cache, MB": ("bytes", "{:.0f}")}


def _order(row: tuple[str, str]) -> tuple[bool, int, str]:
    """Order rows: encoded weights first, dense caches before others, `QuantizedCache` last."""
    weights, cache = row
    kinds = list(GENERATED)
    kind = cache.partition(":")[0]
    place = 2 if kind not in kinds else kinds.index(kind) if kind in DENSE else 3 + kinds.index(kind)
    return weights == "bf16", place, cache


def _cell(line: Line | None, name: str, form: str) -> str:
    """Return a figure of a line, or that the line is wrong."""
    if line is None:
        return ""
    numbers = {**line["numbers"], "bytes": line["bytes"] / 1e6}
    if numbers["red"] and name == "ms_token":
        return "**wrong**"
    return form.format(numbers[name]) if name in numbers else ""


def on_processor(found: Mapping[str, Line]) -> str:
    """Attention alone on the processor, a line a case."""
    body = []
    for line in found.values():
        case, numbers = line["case"], line["numbers"]
        heads = "{} over {} of {}".format(*case["shape"])
        best = min(value for name, value in numbers.items() if name.startswith("dense"))
        verdict = "" if "passed" not in numbers else "pass" if numbers["passed"] else "**fail**"
        body.append([heads, f"{case['tokens']:,}", f"`{case['method']}`", f"{numbers['codes_ms']:.2f}", f"{best:.2f}",
                     f"{numbers['x_dense']:.2f}", f"{numbers['x_float32']:.2f}", verdict])
    return table(["heads", "tokens", "cache", "ms", "fastest dense, ms", "x dense", "x dense float32", "asked"], body)


GENERATING = {"kv-generate": Table(generating, ("generate",))}
ON_PROCESSOR = {"kv-attention-cpu": Table(on_processor, ("lanes",))}
ATTENTION = {"kv-attention": Table(attention, ("attend",))}
TABLES = {"kv-gpu": Table(kv, ("gpu", "gpuprofile"))}

"""The tables of files that others serve."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.suite import Builder, Line, Table
from bench.suites.serving import cases


def gguf(model: str) -> Builder:
    """KL at the bytes of llama-quantize's types."""
    def build(found: Mapping[str, Line]) -> str:
        rows = []
        for case in (*cases.OURS, *cases.WIDER):
            line, peer = found.get(case.key), found.get(case.peer.key)
            if case.model == model and line is not None:
                numbers = line["numbers"]
                rows.append([case.peer.name, *_peer(peer), f"{line['bytes']:,}", _kinds(numbers["kinds"]),
                             f"{numbers['kl']:.3g}", f"{numbers['perplexity']:.4g}",
                             "" if case.most is None else f"{case.most:g}", verdict(numbers["passed"])])
        return table(["llama-quantize, importance matrix", "bytes of tensors", "types", "KL", "perplexity",
                      "**Tersor**: bytes of tensors", "types", "KL", "perplexity", "asked", ""], rows)

    return build


def packed(found: Mapping[str, Line]) -> str:
    """KL at peers' bits."""
    rows = []
    for bits, group, most in cases.RATES:
        rate = bits + 16 / group
        for case in (one for one in cases.PACKED if one.key in found and _rate(one) == rate):
            line = found[case.key]
            numbers = line["numbers"]
            if isinstance(case, cases.Calibrated):
                who = [case.name, "", ""]
            else:
                who = [f"**Tersor** `--effort {case.effort}`: {_kinds(numbers['kinds'])}", f"{most:g}",
                       verdict(numbers["passed"])]
            rows.append([f"{rate:g}", f"{line['bytes']:,}", f"{numbers['total_bytes']:,}", who[0],
                         f"{numbers['kl']:.3g}", f"{numbers['perplexity']:.4g}", *who[1:]])
    return table(["bits of linears", "their bytes", "bytes in all", "what", "KL", "perplexity", "asked", ""], rows)


def blocks(*, short: bool) -> Builder:
    """Ours beside some of llama-quantize's types, in no more bytes; short: files alone, for the front page."""
    def build(found: Mapping[str, Line]) -> str:
        rows: list[list[str]] = []
        for case in cases.OWN:
            peer = found.get(case.peer.key)
            if peer is None:
                continue
            numbers = peer["numbers"]
            if not rows:
                rows = [["original, bf16", "", "16.000", f"{numbers['perplexity_original']:.2f}", "0.0000"]]
            rows.append([f"llama-quantize {case.peer.name}", *_figures(peer, numbers["parameters"])])
            ours = {"**Tersor**, GGUF": next(one.key for one in cases.OURS if one.peer == case.peer)}
            if not short:
                ours["**Tersor**, its own format"] = case.key
            rows += [[name, *_figures(found[key], numbers["parameters"])] for name, key in ours.items() if key in found]
        if short:
            return table(["method", "bits per parameter", "perplexity", "[KL](docs/glossary.md#kl)"],
                         [[row[0], *row[2:]] for row in rows])
        return table(["method", "bytes", "bits per parameter", "perplexity", "KL, nats"], rows)

    return build


def _figures(line: Line, parameters: int) -> list[str]:
    nbytes, numbers = line["bytes"], line["numbers"]
    return [f"{nbytes:,}", f"{8 * nbytes / parameters:.3f}", f"{numbers['perplexity']:.2f}", f"{numbers['kl']:.4f}"]


def _rate(case: cases.Calibrated | cases.Packed) -> float:
    return case.rate if isinstance(case, cases.Calibrated) else case.bits


def _peer(line: Line | None) -> list[str]:
    if line is None:
        return ["", "", "not run", ""]
    numbers = line["numbers"]
    return [f"{line['bytes']:,}", _kinds(numbers["kinds"]), f"{numbers['kl']:.3g}", f"{numbers['perplexity']:.4g}"]


def shards(found: Mapping[str, Line]) -> str:
    """Memory by blocks."""
    rows = []
    for case in cases.SHARDS:
        line = found.get(case.key)
        if line is not None:
            numbers = line["numbers"]
            rows.append([str(case.blocks), f"{numbers['parameters'] / 1e9:.2f}", numbers["types"],
                         f"{line['bytes'] / 1e9:.2f}", f"{numbers['peak_bytes'] / 1e9:.2f}", f"{case.most / 1e9:g}",
                         verdict(numbers["passed"])])
    return table(["blocks", "parameters, 10⁹", "types", "file, GB", "memory, GB", "asked", ""], rows)


def _kinds(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.items())


GGUF = {"gguf": Table(gguf("fable-7m"), ("fable-7m",)), "gguf-22m": Table(gguf("fable-22m"), ("fable-22m",)),
        "front": Table(blocks(short=True), ("fable-7m",), bare=True),
        "calibrated": Table(blocks(short=False), ("fable-7m",))}
PACKED = {"packed": Table(packed)}
SHARDS = {"gguf-shards": Table(shards)}

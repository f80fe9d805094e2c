"""The tables of files that others serve."""

from __future__ import annotations

from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.serving import cases


def gguf(found: Mapping[str, Line]) -> str:
    """KL at the bytes of llama-quantize's types."""
    rows = []
    for case in cases.GGUF:
        line = found.get(case.key)
        if line is not None:
            numbers = line["numbers"]
            rows.append([f"{case.nbytes:,}", case.peer, f"{case.peer_kl:.3g}", f"{numbers['kl']:.3g}",
                         _kinds(numbers["kinds"]), f"{case.most:g}", verdict(numbers["passed"])])
    return table(["bytes of tensors", "peer, importance matrix", "its KL", "ours", "types of ours", "asked", ""], rows)


def packed(found: Mapping[str, Line]) -> str:
    """KL at peers' bits."""
    rows = []
    for case in cases.PACKED:
        line = found.get(case.key)
        if line is not None:
            numbers = line["numbers"]
            rows.append([f"{case.bits:g}", *(f"{kl:.3g}" for kl in case.peer_kl), f"`--effort {case.effort}`",
                         f"{numbers['kl']:.3g}", _kinds(numbers["kinds"]), f"{case.most:g}",
                         verdict(numbers["passed"])])
    return table(["bits of linears", *cases.PEERS, "ours", "KL", "schemes of ours", "asked", ""], rows)


def shards(found: Mapping[str, Line]) -> str:
    """Memory by blocks."""
    rows = []
    for case in cases.SHARDS:
        line = found.get(case.key)
        if line is not None:
            numbers = line["numbers"]
            rows.append([str(case.blocks), f"{numbers['parameters'] / 1e9:.2f}", numbers["types"],
                         f"{line['nbytes'] / 1e9:.2f}", f"{numbers['peak_bytes'] / 1e9:.2f}", f"{case.most / 1e9:g}",
                         verdict(numbers["passed"])])
    return table(["blocks", "parameters, 10⁹", "types", "file, GB", "memory, GB", "asked", ""], rows)


def _kinds(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.items())


GGUF, PACKED, SHARDS = Table(gguf), Table(packed), Table(shards)

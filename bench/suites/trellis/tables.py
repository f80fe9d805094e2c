"""The tables of trellis codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.baselines import shannon_gap
from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.trellis import cases
from tersor.codecs import Trellis
from tersor.families.trellis import WINDOWS, window

# 65,536 states of computed random numbers (QTIP, EXL3 and their like), as the project's limits give it; not run here
CITED = {2.0: 0.0687, 3.0: 0.0178, 4.0: 0.00463}
NAMES = {"lm": "Lloyd-Max", "sym": "symmetric codebook", "two": "two bases", "tr": "trellis"}


def filters_table(found: Mapping[str, Line]) -> str:
    """Error of every filter, by bits and window."""
    rows = []
    for case in cases.GAUSSIAN:
        line = found.get(case.key)
        if line is None:
            continue
        numbers = line["numbers"]
        asked = ["", ""] if case.target is None else [f"{case.target:g}", verdict(numbers["passed"])]
        rows.append([f"`{case.codec}`", f"{case.bits:g}", str(case.memory), f"{numbers['rate']:.3f}",
                     f"{numbers['relative_mse']:.5f}", f"{numbers['shannon_gap_db']:.2f}", *asked])
    return table(["codec", "bits of a stream", "window", "bits per element", "relative error", "dB to Shannon", "asked",
                  ""], rows)


def beams_table(found: Mapping[str, Line]) -> str:
    """Error of windows that beams encode, by survivors and bits."""
    rows = []
    for case in cases.BEAM:
        line = found.get(case.key)
        if line is not None:
            numbers = line["numbers"]
            rows.append([f"`{case.codec}`", f"{case.bits:g}", str(case.memory), f"{case.beam:,}",
                         f"{numbers['relative_mse']:.5f}", f"{numbers['shannon_gap_db']:.2f}", f"{case.target:g}",
                         verdict(numbers["passed"])])
    return table(["codec", "bits of a stream", "window", "survivors", "relative error", "dB to Shannon", "asked", ""],
                 rows)


def efforts_table(found: Mapping[str, Line]) -> str:
    """Error of the window that an effort takes, by bits of a stream."""
    rows = []
    for effort in WINDOWS:
        codecs = {bits: Trellis(bits, memory).spec() for bits in cases.BEST
                  if (memory := window(Trellis, bits, effort)) is not None}
        lines = [found.get(f"gaussian|{codec}") for codec in codecs.values()]
        rows.append([f"`{effort}`", *("" if line is None else f"{line['numbers']['relative_mse']:.5f}"
                                      for line in lines)])
    return table(["effort", *(f"{bits:g} bits" for bits in cases.BEST)], rows)


def peers_table(found: Mapping[str, Line]) -> str:
    """Trellis codes and others by bits; within them by what is lost to Shannon."""
    rows: list[tuple[float, float, Sequence[str]]] = []
    for case in (*cases.OTHERS, *(one for one in cases.GAUSSIAN if one.bits in cases.PEERS)):
        line = found.get(case.key)
        if line is None:
            continue
        numbers = line["numbers"]
        kind = next(name for start, name in NAMES.items() if case.codec.startswith(start))
        kind = f"{'folded' if 'n' in case.codec else 'linear'} {kind}" if kind == NAMES["tr"] else kind
        sweeps = f", {case.sweeps} sweeps" if isinstance(case, cases.PeerCase) and case.sweeps else ""
        rows.append((case.bits, numbers["shannon_gap_db"], [
            f"`{case.codec}`", f"{kind}{sweeps}", f"{numbers['rate']:.3f}", f"{4 ** -numbers['rate']:.5f}",
            f"{numbers['relative_mse']:.5f}", f"{numbers['shannon_gap_db']:.2f}"]))
    rows += [(bits, shannon_gap(bits, error), ["", "computed random code, 65,536 states: cited", f"{bits:.3f}",
                                               f"{4**-bits:.5f}", f"{error:.5f}", f"{shannon_gap(bits, error):.2f}"])
             for bits, error in CITED.items()]
    rows.sort(key=lambda row: row[:2])
    return table(["codec", "kind", "bits per element", "Shannon", "relative error", "dB to Shannon"],
                 [row[2] for row in rows])


def real_table(found: Mapping[str, Line]) -> str:
    """Error over that of a Gaussian matrix, by matrix and codec."""
    rows = []
    for matrix in cases.REAL:
        lines = [found.get(cases.RealCase(matrix, codec).key) for codec in cases.CODECS]
        held = [line["numbers"] for line in lines if line is not None]
        if not held:
            continue
        cells = ["" if line is None else f"{line['numbers']['relative_mse']:.5f} ({line['numbers']['ratio']:.3f})"
                 for line in lines]
        rows.append([matrix, " x ".join(map(str, held[0]["shape"])), *cells,
                     verdict(all(numbers["passed"] for numbers in held))])
    return table(["matrix", "taken", *(f"`rot,{codec}`" for codec in cases.CODECS), "within 1 %"], rows)


def heads_table(found: Mapping[str, Line]) -> str:
    """Error of heads, by width."""
    rows = []
    for codec in cases.CODECS[:3]:
        cells, asked = [], ["", ""]
        for width, targets in cases.HEADS.items():
            line = found.get(cases.HeadCase(width, codec, targets.get(codec)).key)
            cells.append("" if line is None else f"{line['numbers']['relative_mse']:.5f}")
            if line is not None and codec in targets:
                asked = [f"{targets[codec]:g}", verdict(line["numbers"]["passed"])]
        rows.append([f"`{codec}`", *cells, *asked])
    return table(["codec", *(f"heads of {width}" for width in cases.HEADS), "asked of 128", ""], rows)


TABLES = {"trellis": Table(filters_table, prefixes=("gaussian",)),
          "trellis_efforts": Table(efforts_table, prefixes=("gaussian",), bare=True),
          "trellis_beams": Table(beams_table, prefixes=("beam",)),
          "trellis_peers": Table(peers_table, prefixes=("gaussian", "peer")),
          "trellis_real": Table(real_table, prefixes=("real",)),
          "trellis_heads": Table(heads_table, prefixes=("head",))}

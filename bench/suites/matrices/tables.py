"""Tables of synthetic matrices: errors, speed, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.labels import label
from bench.markdown import table, verdict
from bench.suite import Builder, Line, Table
from bench.suites.matrices import cases


def gaussian_table(methods: Mapping[int, Sequence[str]]) -> Builder:
    """Return the table of some methods' relative squared error on three kinds of matrix."""
    def build(found: Mapping[str, Line]) -> str:
        rows = []
        for bits, chosen in methods.items():
            block = []
            for method in chosen:
                lines = [found.get(cases.MatrixCase(kind, method, bits).key) for kind in cases.DATA_TOLERANCE]
                if any(line is None for line in lines):
                    continue
                numbers = [line["numbers"] for line in lines if line is not None]
                block.append((numbers[0]["rate"], [
                    label(method), f"{numbers[0]['rate']:.3f}", *(f"{n['relative_mse']:.4f}" for n in numbers),
                    f"{numbers[0]['shannon_gap_db']:.2f}"]))
            rows += [row for _, row in sorted(block, key=lambda pair: pair[0])]
        return table(["method", "bits per element", "Gaussian", "Student t, 3 d.o.f.", "outlier columns",
                      "dB to Shannon (Gaussian)"], rows)
    return build


def targets_table(found: Mapping[str, Line]) -> str:
    """Rotation + Lloyd-Max against its targets."""
    rows = []
    for case in cases.MATRIX_CASES:
        line = found.get(case.key)
        if case.target is None or line is None:
            continue
        numbers = line["numbers"]
        off = 100 * (numbers["relative_mse"] / case.target - 1)
        rows.append([f"`{case.method}`, {case.data}", f"{numbers['rate']:.4f}", f"{numbers['relative_mse']:.5f}",
                     f"{case.target}", f"{off:+.2f} %", f"{100 * case.tolerance:.0f} %",
                     verdict(numbers["passed"])])
    return table(["case", "bits per element", "relative MSE", "target", "above", "allowed", ""], rows)


def speed_table(found: Mapping[str, Line]) -> str:
    """Encode and decode as multiples of a copy of the matrix."""
    rows = []
    for case in cases.SPEED_CASES:
        line = found.get(case.key)
        if line is None or case.most is None:
            continue
        rows.append([f"{case.operation} `{case.method}`", f"{line['numbers']['ratio']:.1f}", f"{case.most:g}",
                     verdict(line["numbers"]["passed"])])
    return table([f"operation, {cases.SPEED_CASES[0].size} x {cases.SPEED_CASES[0].size} float32", "x copy", "at most",
                  ""], rows)


def packing_table(found: Mapping[str, Line]) -> str:
    """Packing and unpacking by number of levels, as multiples of a copy of the float32 matrix."""
    ratios: dict[str, dict[str, str]] = {}
    for case in cases.SPEED_CASES:
        line = found.get(case.key)
        if line is not None and case.operation in ("pack", "unpack"):
            ratios.setdefault(case.method, {})[case.operation] = f"{line['numbers']['ratio']:.2f}"
    return table(["levels", "pack, x copy", "unpack, x copy"],
                 [[levels, of.get("pack", ""), of.get("unpack", "")] for levels, of in ratios.items()])


def memory_table(found: Mapping[str, Line]) -> str:
    """Peak memory of encoding, above importing torch."""
    rows = []
    for case in cases.MEMORY_CASES:
        line = found.get(case.key)
        if line is None:
            continue
        numbers = line["numbers"]
        rows.append([f"`{case.method}`, {case.rows} x {case.columns}", f"{numbers['dense_bytes'] / 1e6:.0f}",
                     f"{numbers['peak_bytes'] / 1e6:.0f}", f"{numbers['limit_bytes'] / 1e6:.0f}",
                     verdict(numbers["passed"])])
    return table(["encoding", "matrix, MB", "peak, MB", "at most, MB", ""], rows)


GAUSSIAN = {
    "gaussian": Table(gaussian_table(cases.SHORT_METHODS)),
    "gaussian-all": Table(gaussian_table(cases.MATRIX_METHODS)),
    "gaussian-targets": Table(targets_table),
}
SPEED = {
    "speed": Table(speed_table, ("encode", "decode")),
    "packing": Table(packing_table, ("pack", "unpack")),
    "memory": Table(memory_table, ("memory",)),
}

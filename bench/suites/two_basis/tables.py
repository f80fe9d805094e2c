"""The table of the two-basis suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.markdown import table, verdict
from bench.suite import Line, Table

DATA = ("gaussian", "student_t3", "outliers")
TEXTS = ("fiction", "speech", "technical")


def all_of_it(found: Mapping[str, Line]) -> str:
    """Errors by bits and sweeps on three kinds of data; feedback; real matrices; models; what a sweep costs."""
    kinds: dict[str, list[Line]] = {}
    for line in found.values():
        kinds.setdefault(line["key"].partition("|")[0], []).append(line)
    parts = ((_errors, "error"), (_feedback, "feedback"), (_matrices, "matrix"), (_models, "model"), (_costs, "speed"))
    return "\n\n".join(make(kinds[kind]) for make, kind in parts if kind in kinds)


def _errors(lines: Sequence[Line]) -> str:
    """Return relative errors of synthetic matrices, one row for three kinds of data."""
    errors: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        case = line["case"]
        place = (case["device"], case["bits"], f"{case['rows']} x {case['width']}", case["sweeps"], case["method"])
        errors.setdefault(place, {})[case["data"]] = line
    rows = []
    for (device, _, shape, sweeps, method), of in sorted(errors.items()):
        first = next(iter(of.values()))
        target = next((line["case"]["target"] for line in of.values() if line["case"]["target"] is not None), None)
        rows.append([f"`{method}`", device, shape, str(sweeps) if sweeps else "", f"{first['numbers']['rate']:.3f}",
                     *(f"{of[data]['numbers']['relative_error']:.4f}" if data in of else "" for data in DATA),
                     "" if target is None else f"{target:.4f}".rstrip("0"), _verdict(target, of.values())])
    return table(["relative MSE", "device", "matrix", "sweeps", "bits per element", "Gaussian", "Student t, 3 d.o.f.",
                   "outlier columns", "at most", ""], rows)


def _feedback(lines: Sequence[Line]) -> str:
    """Return the losses with error feedback."""
    rows = []
    for line in sorted(lines, key=lambda line: (line["case"]["device"], line["case"]["sweeps"], line["case"]["block"])):
        case, numbers = line["case"], line["numbers"]
        rows.append([str(case["sweeps"]), str(case["block"]), case["device"], f"{numbers['plain']:.4f}",
                     f"{numbers['distortion']:.4f}", f"{numbers['scalar']:.4f}", f"{numbers['ratio']:.3f}",
                     f"{case['target']:g}", _verdict(case["target"], [line])])
    return table(["proxy loss at 2 bits, sweeps", "columns a block", "device", "without feedback", "with",
                   "`rot,lm2` with", "ratio", "at most", ""], rows)


def _matrices(lines: Sequence[Line]) -> str:
    """Return the errors of real matrices over those of Gaussian ones."""
    rows = []
    for line in sorted(lines, key=lambda line: line["case"]["model"]):
        case, numbers = line["case"], line["numbers"]
        rows.append([f"{case['model']} `{case['kind']}`", f"{case['rows']} x {case['width']}", str(numbers["matrices"]),
                     f"{case['sweeps']}, {case['device']}", f"{numbers['relative_error']:.4f}",
                     f"{numbers['gaussian']:.4f}", f"{numbers['ratio']:.3f}", f"{numbers['worst']:.3f}",
                     verdict(numbers["passed"])])
    return table(["`two2x2` on real matrices", "shape", "matrices", "sweeps", "relative MSE", "Gaussian", "ratio",
                   "worst (at most 1.02)", ""], rows)


def _models(lines: Sequence[Line]) -> str:
    """Return perplexity, KL and bytes of models, by nominal bits."""
    rows = []
    for line in sorted(lines, key=lambda line: (line["case"]["model"], line["case"]["bits"], line["bytes"])):
        case, numbers = line["case"], line["numbers"]
        sweeps = f", {case['sweeps']} sweeps" if case["sweeps"] else ""
        rows.append([case["model"], f"`{case['method']}`{sweeps}", case["device"], str(line["bytes"]),
                     f"{numbers['rate']:.3f}", f"{numbers['all']['perplexity']:.2f}", f"{numbers['all']['kl']:.3f}",
                     *(f"{numbers[text]['kl']:.3f}" for text in TEXTS), f"{numbers['all']['top1']:.3f}"])
    return table(["model", "codec of every matrix", "encoded on", "bytes", "bits per parameter",
                   "perplexity", "KL", *(f"KL, {text}" for text in TEXTS), "top-1"], rows)


def _costs(lines: Sequence[Line]) -> str:
    return table(["a sweep at 2 bits", "measured", "at most", "floor", ""], [_cost(line) for line in lines])


def _cost(line: Line) -> list[str]:
    """Return a row: nanoseconds a weight on a GPU, pairs of rotations on a processor."""
    case, numbers = line["case"], line["numbers"]
    shape = f"{case['rows']} x {case['width']}"
    verdict = _verdict(case["target"], [line])
    if case["device"] == "cpu":
        measured = f"{numbers['value']:.1f} pairs of rotations ({numbers['sweep_ns']:.1f} ns a weight)"
        return [f"processor, {shape}", measured, f"{case['target']:g} pairs", "", verdict]
    return [f"{numbers['device']}, {shape}",
            f"{numbers['value']:.4f} ns a weight ({numbers['encode']:.4f} with everything around it)",
            f"{case['target']:g} ns", f"products {numbers['floor_products']:.4f}, random numbers "
            f"{numbers['floor_integer']:.4f} ns", verdict]


def _verdict(target: float | None, lines: Iterable[Line]) -> str:
    passed = all(line["numbers"]["passed"] for line in lines)
    return verdict(None if passed and target is None else passed)


TABLES = {"two-basis": Table(all_of_it)}

"""The tables of the GPU suite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bench.markdown import table, verdict
from bench.suite import Line, Table
from bench.suites.gpu.cases import ENCODE_SHAPES, LAYERS

LARGE = ("14336x4096", "4096x14336")
SHAPES = ("4096x4096", *LARGE, "28672x8192")
SPEEDUPS = {"two2x2": 2.2, "lm2": 2.5, "lm3": 2.2, "lm4": 2.0, "rtn4g128": 2.0}  # x bf16, 4096x4096
FLOORS = {"two2x2": 0.60, "lm2": 0.65, "lm3": 0.65, "lm4": 0.70, "rtn4g128": 0.70}  # share of the byte floor, LARGE
FLOORS_HUGE = {"two2x2": 0.70, "lm2": 0.75, "lm3": 0.75, "lm4": 0.80, "rtn4g128": 0.80}  # 28672x8192
FOUR_BITS = ("lm4", "rot,lm4", "rtn4g128")
CODES = {"two2x2": "2 bits, two-basis", "lm2": "2 bits", "lm3": "3 bits", "lm4": "4 bits, symmetric",
         "rtn4g128": "4 bits, affine, groups of 128"}
BATCH_LEAST = {16: 1.0, 64: 1.0, 4096: 0.8}  # x bf16, four bits
TRELLISES = {"rot,tr2o": "rot,lm2", "rot,tr2.5o": None, "rot,tr3o": "rot,lm3", "rot,tr4o": "rot,lm4"}  # and as scalars
TRELLIS_LEAST = {16: 1.0, 64: 1.0, 4096: 0.85}  # x bf16
TRELLIS_MOST, TRELLIS_SHAPES = 1.1, ("14336x4096", "28672x8192")  # x the time of scalar codes, batch 1
MODEL_LEAST = {"rot,lm4": 2.8, "rot,lm2": 4.0, "two2x2": 4.0}  # x bf16, tokens a second
HADAMARD_MOST = 1.3  # x a copy, 8192 x 4096
ENCODE_MOST = 300.0  # seconds
SHAPES_MOST = {"rot,tr3o": 60.0, "rot,tr3x16o": 360.0}  # of all matrices, with feedback: efforts "normal" and "best"
PEERS = {"bf16": "bf16, cuBLAS", "int4": "int4, torch (tinygemm, group 128)", "nf4": "bitsandbytes NF4, block 64"}


def label(codec: str) -> str:
    """Return how a table names a codec or a peer."""
    return PEERS.get(codec, f"**Tersor** `{codec}`")


def ceilings(found: Mapping[str, Line]) -> str:
    """What the machine does at most: the denominators."""
    copy, gemm = (found.get(f"ceiling|{name}") for name in ("copy", "gemm"))
    body = []
    if copy:
        body.append(["copy of 1 GB, bytes read and written", f"{copy['numbers']['tbs']:.2f} TB/s"])
    if gemm:
        body.append(["bf16 product, 8192 x 8192 x 8192", f"{gemm['numbers']['tflops']:.0f} TFLOP/s"])
    return table(["ceiling", "measured"], body)


def target_of(line: Line) -> tuple[str, bool | None]:
    """Return what a product should reach, and whether it does; nothing where nothing is asked."""
    case, numbers = line["case"], line["numbers"]
    shape, codec = f"{case['shape'][0]}x{case['shape'][1]}", case["codec"]
    red = numbers["red"]
    if case["batch"] == 1 and shape == "4096x4096" and codec in SPEEDUPS:
        return f"{SPEEDUPS[codec]:g} x bf16", not red and numbers.get("x_bf16", 0) >= SPEEDUPS[codec]
    floors = FLOORS if shape in LARGE else FLOORS_HUGE if shape == "28672x8192" else {}
    if case["batch"] == 1 and codec in floors:
        return f"{100 * floors[codec]:.0f} % of the floor", not red and numbers["floor"] >= floors[codec]
    least = (BATCH_LEAST if codec in FOUR_BITS else TRELLIS_LEAST if codec in TRELLISES else {}).get(case["batch"])
    if least is not None:
        return f"{least:g} x bf16", not red and numbers.get("x_bf16", 0) >= least
    return "", None


def products(found: Mapping[str, Line]) -> str:
    """Batch 1: time, bytes, share of the floor, ratio to bf16, error, verdict."""
    body = []
    for line in _products(found):
        case, numbers = line["case"], line["numbers"]
        if case["batch"] != 1:
            continue
        target, passed = target_of(line)
        timed = ["**wrong**", "", "", ""] if numbers["red"] else [
            f"{numbers['us']:.1f}{_how(numbers)}", f"{numbers['tbs']:.2f}",
            f"{100 * numbers['floor']:.0f} %", _ratio(numbers)]
        body.append([f"{case['shape'][0]} x {case['shape'][1]}", label(case["codec"]), f"{numbers['bits']:.3f}",
                     f"{numbers['moved'] / 1e6:.2f}", *timed, f"{numbers['error']:.4f}", target, verdict(passed)])
    return table(["out x in, batch 1", "codec", "bits an element", "MB moved", "us", "TB/s", "of the floor", "x bf16",
                   "relative error", "target", ""], body)


def batches(found: Mapping[str, Line]) -> str:
    """All batches, as ratios to bf16, of what was measured with more than one vector."""
    every = [line for line in _products(found) if not line["case"]["again"]]
    sizes = sorted({line["case"]["batch"] for line in every})
    rows: dict[tuple[str, str], dict[int, Line]] = {}
    for line in every:
        case = line["case"]
        rows.setdefault((f"{case['shape'][0]} x {case['shape'][1]}", case["codec"]), {})[case["batch"]] = line
    body = []
    for (shape, codec), of in rows.items():
        if set(of) <= {1}:
            continue
        cells, verdicts = [], []
        for size in sizes:
            line = of.get(size)
            if line is None or line["numbers"]["red"]:
                cells.append("" if line is None else "**wrong**")
                continue
            numbers = line["numbers"]
            cells.append(f"{numbers['us']:.0f} us" if codec == "bf16" else _ratio(numbers))
            target, passed = target_of(line)
            if target and size != 1:
                verdicts.append(passed)
        body.append([shape, label(codec), *cells, verdict(all(verdicts)) if verdicts else ""])
    return table(["x bf16 (bf16: time)", "codec", *(f"batch {size}" for size in sizes),
                   "4 bits, trellises: 1 at 16 and 64, 0.8 and 0.85 at 4096"], body)


def hadamard(found: Mapping[str, Line]) -> str:
    """The transform against a copy."""
    body = []
    for line in found.values():
        case, numbers = line["case"], line["numbers"]
        judged = (case["rows"], case["width"], numbers["dtype"]) == (8192, 4096, "bfloat16")
        timed = ["**wrong**", "", ""] if numbers["red"] else [f"{numbers['us']:.1f}", f"{numbers['copy_us']:.1f}",
                                                              f"{numbers['x_copy']:.2f}"]
        passed = not numbers["red"] and numbers["x_copy"] <= HADAMARD_MOST if judged else None
        body.append([f"{case['rows']} x {case['width']}", numbers["dtype"], *timed, f"{numbers['error']:.2g}",
                     f"{HADAMARD_MOST:g}" if judged else "", verdict(passed)])
    return table(["activations", "dtype", "us", "copy, us", "x copy", "relative error", "at most", ""], body)


def targets(found: Mapping[str, Line]) -> str:
    """Batch 1, as the targets were put: a row a shape, a column a kind of code."""
    body = []
    for shape in SHAPES:
        cells = []
        for codec in CODES:
            line = found.get(f"product|{shape}|1|{codec}")
            if line is None:
                cells.append("")
                continue
            target, passed = target_of(line)
            numbers, share = line["numbers"], "floor" in target
            value = f"{100 * numbers['floor']:.0f} %" if share else f"{_ratio(numbers)} x"
            cells.append("**wrong**" if numbers["red"] else f"{value} of {target.replace(' of the floor', '')} "
                         f"{verdict(passed)}".replace(" x bf16", " x"))
        unit = "speed of bf16" if shape == SHAPES[0] else "of the floor"
        body.append([f"{shape.replace('x', ' x ')}, {unit}", *cells])
    return table(["batch 1: reached of asked", *CODES.values()], body)


def others(found: Mapping[str, Line]) -> str:
    """All other targets; the worst of what was measured."""
    body = []
    line = found.get("hadamard|8192x4096|bfloat16")
    if line:
        passed = not line["numbers"]["red"] and line["numbers"]["x_copy"] <= HADAMARD_MOST
        body.append(["Hadamard, 8192 x 4096 bf16, time of a copy", f"at most {HADAMARD_MOST:g} x",
                     f"{line['numbers']['x_copy']:.2f} x", verdict(passed)])
    for named, codecs, asked in (("4 bits", FOUR_BITS, BATCH_LEAST),
                                 ("trellis codes of 2 to 4 bits", tuple(TRELLISES), TRELLIS_LEAST)):
        for batch, least in asked.items():
            lines = [line for line in found.values() if line["case"]["what"] == "product"
                     and line["case"]["batch"] == batch and line["case"]["codec"] in codecs]
            if lines:
                ratios = [0.0 if line["numbers"]["red"] else line["numbers"]["x_bf16"] for line in lines]
                shapes = len({_shape(line) for line in lines})
                body.append([f"{named}, batch {batch}, speed of bf16, {shapes} shapes", f"at least {least:g} x",
                             f"{min(ratios):.2f} to {max(ratios):.2f} x", verdict(min(ratios) >= least)])
    body += [*_trellis_rows(found), *_model_rows(found), *_logits_rows(found), *_encode_rows(found)]
    return table(["", "target", "measured", ""], body)


def _trellis_rows(found: Mapping[str, Line]) -> list[list[str]]:
    """One vector and trellis codes: against scalar codes of as many bits, and two bases, on the same device."""
    scalar, bases = list[float](), list[float]()
    for codec, other in TRELLISES.items():
        for shape in SHAPES:
            line = found.get(f"product|{shape}|1|{codec}")
            if other is not None and shape in TRELLIS_SHAPES:
                scalar += _times(line, found.get(f"product|{shape}|1|{other}"))
            bases += _times(line, found.get(f"product|{shape}|1|two2x2"))
    body = []
    if scalar:
        body.append([f"trellis codes, batch 1, time of scalar codes of as many bits, {len(scalar)} products",
                     f"at most {TRELLIS_MOST:g} x", f"{min(scalar):.2f} to {max(scalar):.2f} x",
                     verdict(max(scalar) <= TRELLIS_MOST)])
    if bases:
        body.append([f"trellis codes, batch 1, time of `two2x2`, {len(bases)} products", "at most 1 x",
                     f"{min(bases):.2f} to {max(bases):.2f} x", verdict(max(bases) <= 1)])
    return body


def _times(line: Line | None, other: Line | None) -> list[float]:
    """Return how many times as long a line took as another, where both were measured on one kind of device."""
    if line is None or other is None or line["machine"]["cpu"] != other["machine"]["cpu"]:
        return []
    if line["numbers"]["red"] or other["numbers"]["red"]:
        return [math.inf]
    return [line["numbers"]["us"] / other["numbers"]["us"]]


def _model_rows(found: Mapping[str, Line]) -> list[list[str]]:
    """Tokens a second against the targets: the best ratio to bf16 in the same mode."""
    body = []
    for codec, bits in (("rot,lm4", 4), ("rot,lm2", 2)):
        least = MODEL_LEAST[codec]
        lines = [line for line in found.values() if line["case"]["what"] == "model"
                 and line["case"]["codec"] == codec and line["case"]["layers"] == 32]
        best, mode = max(((0.0 if line["numbers"]["red"] else line["numbers"].get("x_bf16", 0.0),
                           line["numbers"]["mode"] + _settings(line["case"])) for line in lines), default=(0.0, ""))
        if lines:
            body.append([f"8B-shaped model, {bits} bits, tokens/s of bf16 in the same mode", f"at least {least:g} x",
                         f"{best:.2f} x ({mode})", verdict(best >= least)])
    return body


def _logits_rows(found: Mapping[str, Line]) -> list[list[str]]:
    """The worst codec of each dtype."""
    body = []
    for dtype in ("float32", "float16"):
        lines = [line for line in found.values() if line["case"]["what"] == "logits" and line["case"]["dtype"] == dtype]
        if lines:
            worst = max(lines, key=lambda line: line["numbers"]["error"])
            numbers = worst["numbers"]
            body.append([f"fable-22m's logits, activations {dtype}, relative error to the processor's",
                         f"at most {numbers['bound']:.2g}", f"{numbers['error']:.2g} (`{worst['case']['codec']}`)",
                         verdict(not any(line["numbers"]["red"] for line in lines))])
    return body


def _encode_rows(found: Mapping[str, Line]) -> list[list[str]]:
    """Whole models encoded."""
    body = []
    for line in found.values():
        case, numbers = line["case"], line["numbers"]
        if case["what"] == "encode_model" and not line["key"].startswith("encode|partial"):
            body.append([f"encoding the 8B-shaped model, `{case['codec']}`, {case['sweeps']} sweeps",
                         f"at most {ENCODE_MOST:g} s", f"{numbers['seconds']:.0f} s",
                         verdict(not numbers["red"] and numbers["seconds"] <= ENCODE_MOST)])
    for name, codec, seconds, _, most, passed in _summed(found):
        body.append([f"encoding {name}, `{codec}` with feedback", f"at most {most}", f"{seconds:.0f} s",
                     verdict(passed)])
    return body


def _summed(found: Mapping[str, Line]) -> list[tuple[str, str, float, float, str, bool]]:
    """Return of each code with a target its matrices, time and worst error: block by block, or else by all shapes."""
    rows = []
    for codec, most in SHAPES_MOST.items():
        whole = found.get(f"encode|blocks|{codec}|{LAYERS}")
        if whole is not None:
            numbers = whole["numbers"]
            rows.append((f"all {numbers['matrices']} matrices, block by block", codec, numbers["seconds"],
                         numbers["relative_error"], f"{most:g}", not numbers["red"] and numbers["seconds"] <= most))
            continue
        keys = [f"encode|{shape[0]}x{shape[1]}|{codec}|feedback" for shape in ENCODE_SHAPES]
        lines = [found[key] for key in keys if key in found]
        if len(lines) == len(keys):
            seconds = sum(line["numbers"]["of_model_s"] for line in lines)
            sound = not any(line["numbers"]["red"] for line in lines)
            rows.append((f"all {sum(ENCODE_SHAPES.values())} matrices, by those of each shape", codec, seconds,
                         max(line["numbers"]["relative_error"] for line in lines), f"{most:g}",
                         sound and seconds <= most))
    return rows


def model(found: Mapping[str, Line]) -> str:
    """Tokens a second, end to end; ratios are to bf16 in the same mode and run."""
    body = []
    ordered = sorted(found.values(), key=lambda line: (line["case"]["codec"] not in PEERS, -line["bytes"],
                                                       line["case"]["codec"], line["numbers"]["mode"] == "graph"))
    for line in ordered:
        case, numbers = line["case"], line["numbers"]
        least = MODEL_LEAST.get(case["codec"])
        ratio = numbers.get("x_bf16", 0.0)
        timed = ["**wrong**", "", ""] if numbers["red"] else [
            f"{numbers['tokens_s']:.1f}", f"{numbers['ms_token']:.2f}", _ratio(numbers)]
        prompt = "" if numbers["red"] else f"{1e-3 * numbers['us_prefill']:.0f}"
        how = numbers["mode"] + _settings(case) + (
            f", {numbers['breaks']} graph breaks" if numbers.get("breaks") else "")
        loading = f"{numbers['load_s']:.0f} ({numbers['verify_s']:.0f})" if "load_s" in numbers else ""
        named = "bf16, Inductor's products" if case["codec"] == "bf16" and case.get("tuned") else label(case["codec"])
        body.append([named, how, f"{line['bytes'] / 1e9:.2f}", f"{numbers['resident'] / 1e9:.2f}",
                     *timed, prompt, loading, f"{numbers['logits_error']:.3f}" if numbers["logits_error"] else "",
                     "" if least is None else f"{least:g} x bf16",
                     verdict(None if least is None else not numbers["red"] and ratio >= least)])
    return table(["8B-shaped Llama, batch 1", "mode", "GB", "resident, GB", "tokens/s", "ms a token", "x bf16",
                   "prompt of 16, ms", "loading (verifying), s", "logits, kernels against plain torch", "target",
                   ""], body)


def _settings(case: Mapping[str, Any]) -> str:
    """Return how a model was compiled, of lines that say so; those before had Inductor's defaults."""
    if case["mode"] != "compiled":
        return ""
    asked = [text for name, text in (("tuned", "tuned"), ("pdl", "early launches")) if case.get(name)]
    return ", ".join(["", *(asked or ["defaults"]), f"attention {case.get('attention', 'sdpa')}"])


def encode(found: Mapping[str, Line]) -> str:
    """Seconds of encoding, by shape and whole."""
    body = []
    lines = [line for line in found.values() if not line["key"].startswith(("encode|partial", "encode|blocks"))]
    done = {(line["case"]["codec"], line["case"]["sweeps"]) for line in lines if line["case"]["what"] == "encode_model"}
    lines += [line for line in found.values() if line not in lines and line["numbers"].get("share", 1) < 1
              and (line["case"]["codec"], line["case"]["sweeps"]) not in done]
    for line in sorted(lines, key=lambda line: line["case"]["what"] == "encode_model"):
        case, numbers = line["case"], line["numbers"]
        whole = case["what"] == "encode_model"
        part = line["key"].startswith("encode|partial")
        name = f"{100 * numbers['share']:.0f} % of the model, stopped; all of it at this pace: " \
               f"{numbers['seconds'] / numbers['share']:.0f} s" if part else (
            f"whole model, {numbers['matrices']} matrices" if whole else
            f"{case['shape'][0]} x {case['shape'][1]}, {case['count']} of them")
        seconds = numbers["seconds"] if whole else numbers["of_model_s"]
        error = numbers["worst"] if whole else numbers["relative_error"]
        how = f"{case['sweeps']} sweeps" if case["sweeps"] else "feedback" if case["feedback"] else "no feedback"
        body.append([name, f"`{case['codec']}`, {how}", f"{seconds:.1f}",
                     f"{numbers['encode_s']:.1f}" if whole else "",
                     f"{numbers['ns_sweep']:.4f}" if case["sweeps"] else "", f"{error:.4f}",
                     f"{ENCODE_MOST:g}" if whole else "",
                     verdict(not numbers["red"] and seconds <= ENCODE_MOST if whole and not part else None)])
    body += [[name, f"`{codec}`, feedback", f"{seconds:.1f}", "", "", f"{error:.4f}", most, verdict(passed)]
             for name, codec, seconds, error, most, passed in _summed(found)]
    return table(["matrices", "codec", "seconds", "of encoding alone", "ns a weight and sweep", "relative MSE, worst",
                   "at most, s", ""], body)


def logits(found: Mapping[str, Line]) -> str:
    """Logits of a trained model on the GPU against the processor's in float32."""
    body = []
    for line in found.values():
        case, numbers = line["case"], line["numbers"]
        plain = " (plain torch)" if "plain" in numbers else ""
        body.append([label(case["codec"]) + plain, case["dtype"], f"{numbers['error']:.2g}", f"{numbers['bound']:.2g}",
                     verdict(not numbers["red"]), f"{numbers['error_plain']:.2g}", f"{numbers['error_kernels']:.2g}",
                     f"{numbers['most']:.2g} of {numbers['largest']:.1f}", f"{100 * numbers['top1']:.1f} %"])
    return table(["fable-22m, 256 tokens", "activations on the GPU", "relative error", "at most", "",
                   "of plain torch on the GPU", "kernels against plain torch", "largest error, of the largest logit",
                   "same first choice"], body)


def _products(found: Mapping[str, Line]) -> list[Line]:
    """Return the lines of products by shape, in the order measured."""
    order = SHAPES
    lines = [line for line in found.values() if line["case"]["what"] == "product"]
    return sorted(lines, key=lambda line: ([*order, ""].index(_shape(line) if _shape(line) in order else ""),
                                           line["numbers"]["bits"]))


def _shape(line: Line) -> str:
    return f"{line['case']['shape'][0]}x{line['case']['shape'][1]}"


def _how(numbers: Mapping[str, Any]) -> str:
    """Return what sets a time apart: no kernel, or launches one by one."""
    return " (plain torch)" if "plain" in numbers else "" if numbers["timed"] == "graph" else " (no graph)"


def _ratio(numbers: Mapping[str, Any]) -> str:
    return f"{numbers['x_bf16']:.2f}" if "x_bf16" in numbers else ""


TABLES = {  # of one device each: ratios are to what was measured on the same
    "gpu-ceilings": Table(ceilings, ("ceiling",), on="H100"), "gpu-products": Table(products, ("product",), on="H100"),
    "gpu-batches": Table(batches, ("product",), on="H100"), "gpu-hadamard": Table(hadamard, ("hadamard",), on="H100"),
    "gpu-targets": Table(targets, ("product",), on="H100"), "gpu-model": Table(model, ("model",), on="H100"),
    "gpu-targets-other": Table(others, ("product", "hadamard", "model", "logits", "encode"), on="H100"),
    "gpu-logits": Table(logits, ("logits",), on="H100"), "gpu-encode": Table(encode, ("encode",), on="H100"),
    "gpu-products-h200": Table(products, ("product",), on="H200"),
    "gpu-batches-h200": Table(batches, ("product",), on="H200"),
    "gpu-targets-h200": Table(others, ("product", "encode"), on="H200"),
    "gpu-encode-h200": Table(encode, ("encode",), on="H200"),
}

"""Tables of the ROM suite: the ladder, what each rung is worth, equal bytes, cost, and the issue's targets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from bench.markdown import table, verdict
from bench.places import DOMAINS
from bench.suite import Builder, Line, Table
from bench.suites.rom.cases import EQUAL, KEEPS, RUNGS, SOURCES, Case, calibration_of, dense

CALIBRATED = {"house": "calibration.txt", "wikitext": "WikiText-2 valid"}
TEXTS = (*DOMAINS, "wikitext")
MISSED = "**missed**"
HALVED, WITHIN, SECONDS, PEAK, DEFAULT_SEQUENCES = 2.0, 0.005, 900, 3e9, 512
TARGETED = ("plus_allocated", "plus_gauge", "preset_allocated", "preset")


def _ladder(found: Mapping[str, Line], model: str, keep: float, calibration: str, rung: str) -> Line | None:
    line = found.get(Case("ladder", model, keep, calibration, rung).key)
    return None if line is None or "refused" in line["numbers"] else line["numbers"]


def _kl(numbers: Line | None, text: str) -> str:
    return "" if numbers is None else _short(numbers["texts"][text]["kl"])


def _short(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _full(label: str, calibration: str, numbers: Line) -> list[str]:
    texts, task = numbers["texts"], numbers["blimp"]
    seconds, peak = numbers["seconds"], numbers.get("peak_bytes")
    return [label, calibration, *(_short(texts[t]["kl"]) for t in TEXTS),
            *(_perplexity(texts[t]["perplexity"]) for t in TEXTS),
            f"{100 * task['accuracy']:.1f} ± {100 * task['error']:.1f}", f"{numbers['parameters'] / 1e6:.2f}",
            f"{numbers['bytes'] / 1e6:.2f}", f"{numbers['macs_per_token'] / 1e6:.2f}",
            f"{seconds:.0f}" if seconds else "", f"{peak / 1e9:.2f}" if peak else ""]


def ladder(model: str, keep: float) -> Builder:
    """Return the builder of the ladder's table of one model and fraction kept."""
    def build(found: Mapping[str, Line]) -> str:
        body = []
        if dense(model).key in found:
            body.append(_full("dense", "", found[dense(model).key]["numbers"]))
        for calibration in (calibration_of(model, side) for side in ("in", "out")):
            for rung, told in RUNGS.items():
                numbers = _ladder(found, model, keep, calibration, rung)
                if numbers is not None:
                    body.append(_full(told.label, CALIBRATED[calibration], numbers))
        names = ("fiction", "speech", "technical", "WikiText-2")
        return table(["method", "calibrated on", *(f"KL, {n}" for n in names), *(f"perplexity, {n}" for n in names),
                       "BLiMP, %", "10⁶ parameters", "MB", "10⁶ MACs a token", "s", "peak, GB"], body)
    return build


def summary(model: str) -> Builder:
    """Return the builder of KL by rung and fraction kept, in and out of domain."""
    def build(found: Mapping[str, Line]) -> str:
        keeps = [keep for keep in KEEPS if any(_ladder(found, model, keep, c, r) for c in CALIBRATED for r in RUNGS)]
        views = (("house", "house"), ("wikitext", "house"), ("house", "wikitext"), ("wikitext", "wikitext"))
        body = []
        for text, calibration in views:
            seen = "in" if text == calibration else "out of"
            where = f"{'three texts' if text == 'house' else 'WikiText-2'}, {seen} domain"
            for rung, told in RUNGS.items():
                cells = [_ladder(found, model, keep, calibration, rung) for keep in keeps]
                if any(cells):
                    body.append([where, told.label, *(_kl(cell, text) for cell in cells),
                                 *("" if cell is None else f"{100 * cell['blimp']['accuracy']:.1f}" for cell in cells)])
        return table(["KL on", "method", *(f"keep {keep:g}" for keep in keeps),
                       *(f"BLiMP, keep {keep:g}" for keep in keeps)], body)
    return build


STEPS = (("asvd", "svd", "scaling the inputs"), ("rom", "rom_released", "uncentred instead of centred without bias"),
         ("rom_uniform", "asvd", "outputs' eigenvectors (both uniform)"),
         ("rom", "rom_uniform", "last modules instead of uniform"),
         ("plus_uniform", "rom_uniform", "anchoring and bias"), ("plus_allocated", "plus_uniform", "allocation"),
         ("plus_gauge", "plus_allocated", "gauge fixing"), ("preset", "plus_gauge", "no bias, ridge .3"),
         ("plus_allocated", "rom", "all, pairs / `rom`"), ("plus_gauge", "rom", "all / `rom`"),
         ("preset", "rom", "`rom_plus` as it is now / `rom`"))


def steps(found: Mapping[str, Line]) -> str:
    """Return the factor by which each step multiplies KL, three texts / WikiText-2, by model, keep and calibration."""
    body = []
    for model, keep, calibration in itertools.product(SOURCES, KEEPS, CALIBRATED):
        cells = {rung: _ladder(found, model, keep, calibration, rung) for rung in RUNGS}
        ratios = [_ratio(cells[after], cells[before]) for after, before, _ in STEPS]
        if any(ratios):
            body.append([f"{model}, {keep:g}, {CALIBRATED[calibration]}", *ratios])
    return table(["KL is multiplied by", *(what for *_, what in STEPS)], body)


def _ratio(new: Line | None, old: Line | None) -> str:
    if new is None or old is None:
        return ""
    return " / ".join(f"{new['texts'][text]['kl'] / old['texts'][text]['kl']:.2f}" for text in ("house", "wikitext"))


def equal(found: Mapping[str, Line]) -> str:
    """Return the table at equal bytes."""
    lines = [line for line in found.values() if line["case"]["kind"] == "equal"]
    order = list(EQUAL)
    lines.sort(key=lambda line: (line["case"]["model"], line["case"]["level"], order.index(line["case"]["method"])))
    body = []
    for line in lines:
        case, numbers = line["case"], line["numbers"]
        head = [f"{case['model']}, {case['level']:g} bits", EQUAL[case["method"]].label]
        if "refused" in numbers:
            body.append([*head, "out of reach", *([""] * 7)])
            continue
        kept = f"{numbers['kept']:.3f}" if "kept" in numbers else ""
        texts = numbers["texts"]
        body.append([*head, f"{line['bytes']:,}", kept, _kl(numbers, "house"), _kl(numbers, "wikitext"),
                     _perplexity(texts["house"]["perplexity"]), _perplexity(texts["wikitext"]["perplexity"]),
                     f"{100 * numbers['blimp']['accuracy']:.1f}", f"{numbers['seconds']:.0f}"])
    return table(["bytes of the whole model", "method", "bytes", "kept of the linears", "KL, three texts",
                   "KL, WikiText-2", "perplexity, three texts", "perplexity, WikiText-2", "BLiMP, %", "s"], body)


def cost(found: Mapping[str, Line]) -> str:
    """Return time and memory over calibration tokens."""
    body = []
    for line in sorted(found.values(), key=lambda line: (line["case"]["model"], line["case"]["level"])):
        numbers = line["numbers"]
        label = RUNGS[line["case"]["method"].partition(" ")[0]].label
        body.append([f"{line['case']['model']}, {label}",
                     f"{line['case']['level'] * 128:,.0f}", f"{numbers['seconds']:.0f}",
                     f"{numbers['peak_bytes'] / 1e9:.2f}"])
    return table(["model", "calibration tokens", "s in all", "peak, GB"], body)


def targets(found: Mapping[str, Line]) -> str:
    """Return the issue's targets: KL halved at keep .8, fractions met, time and memory of SmolLM2."""
    body = []
    for model, calibration, rung in itertools.product(("fable-22m", "smollm2-135m"), CALIBRATED, TARGETED):
        new, old = (_ladder(found, model, 0.8, calibration, one) for one in (rung, "rom"))
        for text, place in (("house", "three texts"), ("wikitext", "WikiText-2")):
            if new is not None and old is not None:
                ratio = old["texts"][text]["kl"] / new["texts"][text]["kl"]
                name = f"{model}, keep .8, {CALIBRATED[calibration]}, {place}: KL of `rom` / {RUNGS[rung].label}"
                asked = f"≥ {HALVED:g}" if "allocated" in rung else ""
                body.append([name, asked, f"{ratio:.2f}", verdict(ratio >= HALVED if asked else None, MISSED)])
    landed = {line["key"]: line["numbers"]["kept"] / line["case"]["level"] - 1 for line in found.values()
              if line["case"]["kind"] == "ladder" and "kept" in line["numbers"]}
    if landed:
        worst = max(landed, key=lambda key: abs(landed[key]))
        body.append([f"fraction kept over the asked one, {len(landed)} runs; worst `{worst.replace('|', ' ')}`",
                     f"± {100 * WITHIN:g} %", f"{100 * landed[worst]:+.2f} %",
                     verdict(abs(landed[worst]) <= WITHIN, MISSED)])
    for line in found.values():
        numbers, case = line["numbers"], line["case"]
        if case["kind"] == "cost" and case["model"] == "smollm2-135m" and case["level"] == DEFAULT_SEQUENCES:
            label = RUNGS[case["method"].partition(" ")[0]].label
            name = f"SmolLM2, keep .8, {DEFAULT_SEQUENCES} x 128 tokens, {label}"
            body.append([f"{name}: seconds", f"< {SECONDS}", f"{numbers['seconds']:.0f}",
                         verdict(numbers["seconds"] < SECONDS, MISSED)])
            body.append([f"{name}: peak, GB", f"< {PEAK / 1e9:g}", f"{numbers['peak_bytes'] / 1e9:.2f}",
                         verdict(numbers["peak_bytes"] < PEAK, MISSED)])
    return table(["target", "asked", "found", ""], body)


TABLES = {
    **{f"rom-{model}-{keep:g}": Table(ladder(model, keep), ("dense", "ladder")) for model in SOURCES for keep in KEEPS},
    **{f"rom-{model}": Table(summary(model), ("ladder",)) for model in SOURCES},
    "rom-steps": Table(steps, ("ladder",)), "rom-equal": Table(equal, ("equal",)), "rom-cost": Table(cost, ("cost",)),
    "rom-targets": Table(targets, ("ladder", "cost")),
}

"""The tables of the KV suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from bench.markdown import table, verdict
from bench.places import DOMAINS
from bench.suite import Builder, Line, Table

BUDGETS = (1.5, 2, 3, 4)
OURS = ("klt", "plan", "free", "trained")
ELEMENTS = {"fable-22m": 6 * 2 * 4 * 64, "smollm2-135m": 30 * 2 * 3 * 64}  # numbers a token
CLAIM = {"keys": 0.1333, "values": 0.1189}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on all windows of a model."""

    model: str
    kind: str
    setting: str
    bits: float
    rate: float
    rate_tables: float
    kl: float
    texts: Mapping[str, float]
    top1: float
    perplexity: float
    held: Mapping[str, int]
    windows: int

    @property
    def name(self) -> str:
        """How a table names it."""
        return label(self.kind, self.setting)


def label(kind: str, setting: str) -> str:
    """Return how a table names a method."""
    if kind in ("quanto", "hqq"):
        bits, key, value = setting.split(",")
        shown = "quanto" if kind == "quanto" else "HQQ"
        return f"`QuantizedCache`, {shown} {bits}-bit, axes {key}/{value}"
    if kind in ("klt", "plan"):
        return f"**Tersor** {'plan' if kind == 'plan' else 'uniform `klt`'} at {setting}"
    if kind == "none":
        return "dense"
    keys, _, values = (setting, "", "") if kind == "qet" else setting.partition(";")
    both = f"`{keys}`" if keys == values or not values else f"`{keys}`, `{values}`"
    return {"kivi": "KIVI form ", "turbo": "TurboQuant form ", "qet": "QET, published: ", "fp8": "",
            "free": "**Tersor** without tables: ", "trained": "**Tersor** "}[kind] + both


def rows(found: Mapping[str, Line]) -> list[Row]:
    """Return the methods that were measured on every window of their model, by bits."""
    groups: dict[tuple[str, str, float], list[Line]] = {}
    for line in found.values():
        case = line["case"]
        groups.setdefault((case["model"], case["method"], case["bits"]), []).append(line)
    most = {model: max(len(of) for (m, *_), of in groups.items() if m == model) for model, *_ in groups}
    out = []
    for (model, method, bits), lines in groups.items():
        if len(lines) < most[model]:
            continue
        case, first = lines[0]["case"], lines[0]["numbers"]
        sums = {name: sum(line["numbers"][name] for line in lines)
                for name in ("predictions", "divergence", "agreed", "loss")}
        texts = {}
        for text in DOMAINS:
            of = [line["numbers"] for line in lines if line["case"]["window"].startswith(text)]
            texts[text] = sum(n["divergence"] for n in of) / max(1, sum(n["predictions"] for n in of))
        n = sums["predictions"]
        out.append(Row(model, case["kind"], case["setting"] or method.partition(":")[2], bits, first["rate_half"],
                       first["rate_tables"], sums["divergence"] / n, texts, sums["agreed"] / n,
                       2.718281828459045 ** (sums["loss"] / n), first["held"], len(lines)))
    return sorted(out, key=lambda row: (row.model, row.rate, row.name))


def quality(model: str) -> Builder:
    """Return the table of a model."""
    return lambda found: _quality([row for row in rows(found) if row.model == model])


def _quality(chosen: Sequence[Row]) -> str:
    """All methods: bits with and without tables, KL by text, top-1, perplexity, bytes held."""
    body = []
    for row in chosen:
        held = {name: f"{row.held[name] / 1e6:.2f}" for name in ("payload", "tables", "recent", "sinks")}
        body.append([row.name, f"{row.rate:.2f}" if row.rate else "32",
                     f"{row.rate_tables:.2f}" if row.rate else "32", f"{row.kl:.4f}",
                     *(f"{row.texts[text]:.4f}" for text in DOMAINS), f"{row.top1:.3f}", f"{row.perplexity:.2f}",
                     *held.values()])
    return table(["cache", "bits an element", "with tables", "KL", *(f"KL, {text}" for text in DOMAINS),
                   "top-1", "perplexity", "payload, MB", "tables, MB", "recent, MB", "sinks, MB"], body)


def verdicts(found: Mapping[str, Line]) -> str:
    """By model and nominal bits: how many others are beaten at equal or fewer bytes, and which of them is hardest."""
    body = []
    every = rows(found)
    for model in dict.fromkeys(row.model for row in every):
        mine = [row for row in every if row.model == model and row.kind in OURS]
        for bits in BUDGETS:
            others = [row for row in every if (row.model, row.bits) == (model, bits) and row.kind not in OURS]
            duels = sorted((duel(mine, other) for other in others), key=lambda one: -one.ratio)
            if not duels:
                continue
            pays = max(one.pays for one in duels)
            body.append([model, f"{bits:g}", f"{sum(one.ratio < 1 for one in duels)} of {len(duels)}",
                         f"{sum(one.alone for one in duels)} of {len(duels)}",
                         f"{duels[0].other.name} ({duels[0].other.rate:.2f} bits): {duels[0].other.kl:.4f}",
                         duels[0].best, "never" if pays == float("inf") else f"{pays:,.0f}"])
    return table(["model", "bits", "beaten at equal or fewer bytes", "with tables, for one prompt", "the hardest, KL",
                   "Tersor's best within it", "tables pay from, tokens"], body)


@dataclasses.dataclass(frozen=True)
class Duel:
    """Another method against Tersor's settings of equal or fewer bytes.

    Attributes
    ----------
    ratio : float
        The least KL of those settings over the other's.
    alone : bool
        Whether a setting of lower KL is smaller even where one prompt pays for the tables.
    pays : float
        Encoded tokens, of all sequences that share the tables, from which a setting of lower KL is smaller with its
        tables.
    """

    other: Row
    ratio: float
    best: str
    alone: bool
    pays: float


def duel(mine: Sequence[Row], other: Row) -> Duel:
    """Judge; `mine` are Tersor's settings on the same model."""
    within = [row for row in mine if row.rate <= other.rate + 1e-9]
    if not within:
        return Duel(other, float("inf"), "no setting as small", False, float("inf"))
    best = min(within, key=lambda row: row.kl)
    pays = [0.0 if not row.held["tables"] else
            8 * row.held["tables"] / ELEMENTS[row.model] / max(1e-9, other.rate - row.rate)
            for row in within if row.kl < other.kl]
    alone = any(row.rate_tables <= other.rate + 1e-9 and row.kl < other.kl for row in within)
    return Duel(other, best.kl / other.kl, f"{best.name} ({best.rate:.2f} bits): {best.kl:.4f}", alone,
                min(pays, default=float("inf")))


def needle(found: Mapping[str, Line]) -> str:
    """Keys found, digits right, and the answers' log-probability."""
    body = []
    for line in sorted(found.values(), key=lambda line: (line["case"]["kind"] != "none", line["case"]["bits"],
                                                          line["case"]["kind"], line["case"]["method"])):
        case, numbers = line["case"], line["numbers"]
        body.append([label(case["kind"], case["method"].partition(":")[2]),
                     f"{numbers['rate_half']:.2f}" if numbers["rate_half"] else "32",
                     f"{numbers['right']:.0f} of {numbers['trials']}", f"{numbers['digits']:.3f}",
                     f"{numbers['logprob']:.2f}"])
    return table(["planted keys", "bits an element", "found", "tokens right", "log-probability of the key, nats"],
                  body)


def speed(found: Mapping[str, Line]) -> str:
    """Milliseconds a token, and tokens a second as a ratio to dense and to quanto."""
    body = []
    for line in sorted(found.values(), key=lambda line: (line["case"]["tokens"], line["case"]["bits"] != 32,
                                                          line["case"]["kind"], line["case"]["bits"])):
        case, n = line["case"], line["numbers"]
        ratios = [n.get(f"x_{name}", 0.0) for name in ("none:", "quanto:4,0,0", "quanto:2,0,0", "quanto:4,-1,0")]
        judged = case["kind"] == "klt" and case["attention"] == "tersor"
        marks = [verdict(ok) for ok in (ratios[0] >= 0.35, min(ratios[1:]) >= 3)]
        body.append([str(case["tokens"]), label(case["kind"], case["method"].partition(":")[2]), case["attention"],
                     f"{1e3 * n['step_s']:.0f}", f"{1e3 * n['now_and_then_s']:.1f}", *(f"{x:.2f}" for x in ratios),
                     *(marks if judged else ("", ""))])
    return table(["tokens", "cache", "attention", "ms a step", "ms a token for encoding", "tokens/s, x dense",
                   "x quanto 4-bit", "x quanto 2-bit", "x quanto 4-bit, axes -1/0", "0.35 x dense", "3 x each quanto"],
                  body)


def claim(found: Mapping[str, Line]) -> str:
    """QET's error over that of the better of PQ and OPQ: by its own accounting at 4x from fp32, and at equal bytes."""
    body = []
    for data, published in CLAIM.items():
        own = {method: found[f"reproduction|nmse|{data}|{method}|tersor"]["numbers"]["value"]
               for method in ("qet", "pq", "opq")}
        body.append([data, "its own accounting, 4x from fp32", f"{100 * published:.2f} %", f"{own['qet']:.5f}",
                     f"{min(own['pq'], own['opq']):.5f}", f"{100 * own['qet'] / min(own['pq'], own['opq']):.1f} %", ""])
        for bits in (2, 3, 4, 6):
            def least(names: Sequence[str], at: str = f"grid|{data}|{bits}|") -> float:
                return min(found[at + name]["numbers"]["nmse"] for name in names if at + name in found)
            qet, pq = least(("qet", "qet_vanilla")), least(("pq", "faiss:pq", "faiss:opq"))
            body.append([data, f"equal bytes, {bits} bits an element", "", f"{qet:.5f}", f"{pq:.5f}",
                         f"{100 * qet / pq:.0f} %", f"{least(('tersor:qet_plus',)):.5f}"])
    return table(["SmolLM2, layer 15", "bytes", "claimed", "QET", "best of PQ and OPQ", "ratio", "`qet_plus`"], body)


def planted(found: Mapping[str, Line]) -> str:
    """Keys found by method and length of the prompt."""
    lengths = sorted({line["case"]["tokens"] for line in found.values()})
    by_method: dict[str, dict[int, Line]] = {}
    for line in found.values():
        by_method.setdefault(line["case"]["method"], {})[line["case"]["tokens"]] = line
    body = []
    for method, lines in by_method.items():
        first = next(iter(lines.values()))
        rate = first["numbers"]["rate_half"]
        cells = [f"{lines[tokens]['numbers']['right']:.0f} of {lines[tokens]['numbers']['trials']}"
                 f" ({lines[tokens]['numbers']['logprob']:.2f})" if tokens in lines else "" for tokens in lengths]
        body.append([label(first["case"]["kind"], method.partition(":")[2]), f"{rate:.2f}" if rate else "32", *cells])
    return table(["planted keys", "bits an element", *(f"{tokens:,} tokens" for tokens in lengths)], body)


LONG = {"kv-three-windows": Table(quality("smollm2-135m-three"), ("quality",)),
        "kv-planted": Table(planted, ("needle",))}
TABLES = {
    **{f"kv-{name}": Table(quality(name), ("quality",)) for name in ("fable-22m", "smollm2-135m")},
    "kv-verdict": Table(verdicts, ("quality",)),
    "kv-claim": Table(claim, ("reproduction", "grid"), source="qet"),
    "kv-needle": Table(needle, ("needle",)), "kv-speed": Table(speed, ("speed",)),
}

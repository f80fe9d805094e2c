"""Tables of language models at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping

from bench.labels import label
from bench.markdown import table
from bench.places import DOMAINS
from bench.suite import Builder, Line, Table
from bench.suites.language.cases import MODELS


def models_table(model: str, *, short: bool = False) -> Builder:
    """Return the table of one model: peers use as many bytes as Tersor's rows above them, or more.

    The short one has one perplexity, over all texts together.
    """
    def build(found: Mapping[str, Line]) -> str:
        lines = [line for line in found.values() if line["case"]["model"] == model]
        lines.sort(key=lambda line: (line["case"]["method"] != "original", line["case"]["rate"], line["bytes"],
                                     line["key"]))
        texts = ("all",) if short else DOMAINS
        ours: dict[int, int] = {}  # the most bytes of a Tersor row, by block
        for line in lines:
            if label(line["case"]["method"]).startswith("**Tersor**"):
                ours[line["case"]["rate"]] = max(line["bytes"], ours.get(line["case"]["rate"], 0))
        rows = []
        for line in lines:
            numbers = line["numbers"]
            name = label(line["case"]["method"])
            fewer = " (fewer bytes)" if "**" not in name and line["bytes"] < ours.get(line["case"]["rate"], 0) else ""
            perplexities = [f"{numbers[text]['perplexity']:.2f}" for text in texts]
            rows.append([name + fewer, f"{line['bytes']:,}", f"{numbers['rate']:.3f}", *perplexities,
                         f"{numbers['all']['kl']:.4f}", f"{100 * numbers['all']['top1']:.1f} %"])
        heads = ["perplexity"] if short else [f"perplexity, {text}" for text in texts]
        return table(["method", "bytes", "bits per parameter", *heads, "KL, nats", "same top token"], rows)
    return build


TABLES = {
    "models": Table(models_table("fable-22m", short=True), ("fable-22m",)),
    **{f"models-{name}": Table(models_table(name), (name,)) for name in (*MODELS, "smollm2-135m")},
}

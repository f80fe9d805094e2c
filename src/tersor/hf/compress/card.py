"""The model card, `README.md` of a compressed model: whose it is, what it measures, how to load it, how it was made.

A card holds no clock and no path, so that equal runs write equal cards. It lies beside what the manifest digests, for
its owner to edit.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tersor
from tersor.errors import CodecConfigError
from tersor.families import families
from tersor.families import options as family_options
from tersor.figures import size_text
from tersor.hf.compress.request import Request, Sampling
from tersor.hf.models.source import Source

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "pipeline_tag")  # of the base's front matter
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FRONT_MATTER = 65536  # characters of the base's card that are looked at
SWITCHES = {"calibrated": "--uncalibrated", "whole": "--whole-model", "recover": "--recover",
            "recover_blocks": "--recover-blocks"}
FLAGS = {"calibration": "--calibration-text", "text": "--text", "evaluation_tokens": "--evaluation-tokens",
         "context": "--context", "effort": "--effort", "seed": "--seed", "device": "--device",
         "base_model": "--base-model", "recover_passes": "--recover-passes",
         "recover_tokens": "--recover-tokens", "recover_own": "--recover-own"}


@dataclasses.dataclass(frozen=True)
class Base:
    """What a card says of the model that was compressed.

    Attributes
    ----------
    name : str or None
        On the hub.
    architecture : str
        The class that `config.json` names.
    carried : mapping of str to str
        Fields of its own card: the licence, above all.
    has_card : bool
    """

    name: str | None
    architecture: str
    carried: Mapping[str, str]
    has_card: bool


def check_name(name: str | None) -> None:
    """Raise `CodecConfigError` unless a base model is named as a hub names it, or not at all."""
    if name is not None and not HUB_NAME.fullmatch(name):
        raise CodecConfigError(f"base model '{name}': expected OWNER/NAME, as the hub names it")


def base_of(source: Source, name: str | None = None) -> Base:
    """Return what is known of a source; `name` replaces the one that its configuration may hold."""
    config = source.config_json()
    named = str(config.get("_name_or_path") or "")
    own = source.path / CARD
    text = _start(own) if source.path.is_dir() and own.is_file() else None
    return Base(name or (named if HUB_NAME.fullmatch(named) else None),
                _architecture(config), {} if text is None else front_matter(text), text is not None)


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type", "model")])[0])


def _start(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as handle:
        return handle.read(FRONT_MATTER)


def front_matter(text: str) -> dict[str, str]:
    """Return the fields of `CARRIED` that a card's front matter gives as plain one-line values."""
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    found: dict[str, str] = {}
    for line in block[1].splitlines() if block else ():
        field, colon, value = line.partition(":")
        value = re.sub(r"\s+#.*$", "", value).strip().strip("'\"")
        if colon and field in CARRIED and value and value[0] not in "[{&*!|>%@`":
            found[field] = value
    return found


def headline(report: Mapping[str, Any]) -> str:
    """Return what a report comes to, in one sentence."""
    summary, scores = report["summary"], report.get("evaluation")
    size, original = summary["bytes"], summary["bytes_original"]
    text = (f"The model takes {size_text(size)} instead of {size_text(original)}, {original / size:.1f} times "
            f"smaller, at {summary['rate']:.2f} bits per parameter")
    if not scores:
        return f"{text}; how close it is to the original was not evaluated."
    if "output_error" in scores:
        return f"{text}; the relative squared error of its output is {scores['output_error']:.3g}."
    if "perplexity" not in scores:
        return (f"{text}; its KL to the original is {scores['kl']:.3g} nats, and its most likely answer is the "
                f"original's in {100 * scores['top1']:.1f} %.")
    return (f"{text}; its KL to the original is {scores['kl']:.3g} nats a token, and its perplexity "
            f"{scores['perplexity']:.2f} instead of {scores['perplexity_original']:.2f}.")


def loading(folder: Path, name: str = ".") -> str:
    """Return Python that loads the compressed model in a folder, by the class of its original, and lets it write.

    Parameters
    ----------
    name : str
        The folder as the reader's Python finds it.
    """
    architecture = _architecture(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    kind, writes = "AutoModelForCausalLM" if causal else architecture, causal and any(folder.glob("tokenizer*"))
    lines = ["import tersor.hf  # tells transformers about the format",
             f"from transformers import {kind}{', AutoTokenizer' if writes else ''}", "",
             f"folder = {json.dumps(name)}  # where this model lies",
             f"model = {kind}.from_pretrained(folder)"]
    if writes:
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)",
                  'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
                  "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))"]
    return "\n".join(lines)


def command(request: Request, budget: str, changed: Mapping[str, Any]) -> str:
    """Return the command line that makes this model again.

    Parameters
    ----------
    budget : str
        `--rate 3` or `--size 50000`.
    changed : mapping
        The settings that are not their defaults; of files, only names are told.
    """
    listed = ["tersor", "compress", "MODEL", "OUT", *budget.split()]
    known = request.method in families()
    if "method" in changed:
        listed += ["--codec", request.method]
    listed += [flag for field, flag in SWITCHES.items() if field in changed]
    if "sampling" in changed and changed["sampling"].tokens != Sampling.tokens:
        listed += ["--tokens", str(changed["sampling"].tokens)]
    listed += words(changed, FLAGS)
    listed += _patterns(changed)
    defaults = family_options(request.method) if known else {}
    for name, value in request.options.items():
        if name not in defaults or defaults[name] != value:
            listed += ["--option", f"{name}={json.dumps(value)}"]
    if request.sensitivities:
        listed += ["--sensitivities", "FILE"]
    return shlex.join(listed)


def words(changed: Mapping[str, Any], flags: Mapping[str, str]) -> list[str]:
    """Return the words of a command line for fields that are not their defaults; of files, names."""
    return [word for field, flag in flags.items() if field in changed
            for word in (flag, changed[field].name if isinstance(changed[field], Path) else str(changed[field]))]


def _patterns(changed: Mapping[str, Any]) -> list[str]:
    """Return the words that say which tensors stay dense, or are left out; none of them is a pattern, too."""
    flags = {"dense": "--dense", "leave_out": "--leave-out"}
    return [word for field, flag in flags.items() if field in changed
            for pattern in changed[field] or ("",) for word in (flag, pattern)]


def made_by() -> str:
    """Return this version of Tersor, with its commit where the installation or its checkout tells it."""
    commit = _installed_commit() or _checkout_commit(Path(tersor.__file__).parents[2] / ".git")
    return f"Tersor {tersor.__version__}" + (f", commit {commit}" if commit else "")


def _installed_commit() -> str | None:
    try:
        told = importlib.metadata.distribution("tersor").read_text("direct_url.json")
        return None if told is None else json.loads(told).get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, json.JSONDecodeError, AttributeError):
        return None


def _checkout_commit(git: Path) -> str | None:
    """Return the commit that a checkout's HEAD names, or None where that takes more than reading two files."""
    try:
        head = (git / "HEAD").read_text().strip()
        found = (git / head.removeprefix("ref: ")).read_text().strip() if head.startswith("ref: ") else head
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch(r"[0-9a-f]{40,64}", found) else None


def write_card(folder: Path, report: Mapping[str, Any], base: Base, made: str | None = None) -> None:
    """Write the card of a compressed model into its folder.

    Parameters
    ----------
    made : str or None
        The command line, where one command made it.
    """
    (folder / CARD).write_text(card(report, base, loading(folder), made), encoding="utf-8")


def card(report: Mapping[str, Any], base: Base, load: str, made: str | None) -> str:
    """Return the text of a card."""
    title = base.name or base.architecture
    parts = [_front(base), f"# {title}, compressed by Tersor\n", headline(report) + "\n", _figures(report),
             f"## Load it\n\n```python\n{load}\n```\n",
             "The weights stay compressed in memory.\n", _origin(report, base, made)]
    return "\n".join(parts)


def _front(base: Base) -> str:
    fields = {} if base.name is None else {"base_model": base.name}
    fields |= {"base_model_relation": "quantized", "library_name": "transformers", **base.carried}
    lines = [f"{field}: {_scalar(value)}" for field, value in fields.items()]
    return "\n".join(["---", *lines, "tags:", "- tersor", "- compressed", "---", ""])


def _scalar(value: str) -> str:
    """Return a YAML scalar; quoted, which is JSON, unless it is plainly a word."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in ("null", "true", "false", "yes", "no",
                                                                                "on", "off", "y", "n")
    return value if plain else json.dumps(value, ensure_ascii=False)


def _figures(report: Mapping[str, Any]) -> str:
    summary, scores, matrices = report["summary"], report.get("evaluation", {}), report["matrices"]
    original = summary["bytes_original"]
    rows = [("bytes", f"{original:,}", f"{summary['bytes']:,}"),
            ("bits per parameter", f"{8 * original / summary['parameters']:.3f}", f"{summary['rate']:.3f}")]
    if "perplexity" in scores:
        rows += [("perplexity", f"{scores['perplexity_original']:.3f}", f"{scores['perplexity']:.3f}")]
    if "kl" in scores:
        rows += [("KL to the original, nats", "0", f"{scores['kl']:.4g}"),
                 ("most likely answer agrees", "100 %", f"{100 * scores['top1']:.1f} %")]
    if "output_error" in scores:
        rows += [("relative squared error of the output", "0", f"{scores['output_error']:.4g}")]
    lines = ["| | original | compressed |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {before} | {after} |" for name, before, after in rows]
    if scores:
        lines += ["", f"Measured on {scores['tokens']:,} tokens of {scores['text'].split(' ')[0]}, in windows of "
                      f"{scores['context']}."]
    if summary.get("package_bytes"):
        lines += ["", f"Decoding also reads {summary['package_bytes']:,} bytes of tables that come with Tersor, in no "
                      "figure above."]
    if matrices:
        errors = {name: line["relative_error"] for name, line in matrices.items()}
        worst = max(errors, key=lambda name: errors[name])
        lines += ["", f"The matrices ({len(errors):,}) have a mean relative error of "
                      f"{sum(errors.values()) / len(errors):.3g}, squared and over the squared norm.",
                  f"The largest is {errors[worst]:.3g}, of `{worst}`.",
                  "Codec, bytes and error of each are in `tersor-report.json`."]
    return "\n".join([*lines, ""])


def _recovered(told: Mapping[str, Any] | None, matrices: Mapping[str, Any]) -> list[str]:
    """Return what a card says of recovery; nothing without one."""
    if told is None:
        return []
    alone = bool(told.get("blocks"))
    what = ("Weights that were not encoded yet were trained, a block at a time," if alone
            else "Scales, norms and biases were trained")
    own = float(told.get("own", 0))
    text = [f"{told['source']}"] if own < 1 else []
    text += ["text that the original wrote itself"] if own else []
    lines = [f"{what} against the original, on {' and '.join(text)}."]
    moved = sum("moved" in line for line in matrices.values())
    if moved:
        before = "" if alone else "Before that, weights that were not encoded yet were trained: "
        lines += [f"{before}{moved:,} matrices were encoded as they were then, not as the original has them.",
                  "Their errors above are against the original's all the same."]
    return lines


def _origin(report: Mapping[str, Any], base: Base, made: str | None) -> str:
    told = report["provenance"]
    lines = ["## How it was made", ""]
    if made:
        lines += ["```sh", made, "```", ""]
    seen = told.get("calibration")
    lines += [f"By {made_by()}."]
    lines += ["No text was used for calibration." if seen is None else
              f"It was calibrated on {seen['tokens']:,} tokens of {seen['source']}."]
    lines += _recovered(told.get("recovery"), report["matrices"])
    lines += [f"The digest of the configuration and weights that went in is `{told['source_sha256']}`."]
    if base.has_card:
        where = f"[{base.name}](https://huggingface.co/{base.name})" if base.name else "the base model"
        lines += [f"The card of {where} says what the model is for and how it was trained; it is not repeated here."]
    return "\n".join([*lines, ""])

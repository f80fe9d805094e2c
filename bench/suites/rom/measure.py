"""LLM-ROM on language models: the ladder from plain SVD to `rom_plus`, equal bytes, and cost.

    rom.py ladder --source fable-22m --keep .8 --calibration in out [--rungs rom plus_gauge] [--tokens 8192]
    rom.py equal-bytes --source fable-22m [--bits 2.5 4] [--methods rom quantized]
    rom.py cost --source smollm2-135m
    rom.py --merge FOLDER/rom.jsonl                      # lines of a run elsewhere

Each compression runs in a process of its own, one thread, whose peak memory is its VmHWM, libraries included. Cases
whose line is there already are skipped (`--again`: not). Perplexity, KL, BLiMP: rom_data.py. `in` and `out` (of domain)
are seen from the fable models' three texts, and from WikiText-2 for SmolLM2; every line has all four texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import common
import models
import rom_cases
import rom_data
from rom_cases import EQUAL, RUNGS, SEED, Case
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.work import peak_memory
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.source import load_dense, open_source
from tersor.hf.models.text import read_tokenizer

SUITE = "rom"
CHILD_SECONDS, REFUSED = 3600, 3
KEPT_NUMBERS = ("kept", "kept_parameters", "linear_parameters", "parameters", "parameters_original", "bytes",
                "bytes_original", "macs_per_token", "macs_per_token_original", "tokens", "recipe")


def compress(case: Case, source: Path, output: Path) -> dict[str, Any]:
    """Compress as a case says, in this process; return the numbers that do not need the output."""
    if case.method == "quantized":
        size = size_of(source, output.parent, case.level)
        began = time.perf_counter()
        report = compress_model(source, output, size=size, calibration=rom_data.calibration_file(case.calibration,
                                output.parent), evaluation_tokens=0, seed=SEED)["summary"]
        return {"bytes": report["bytes"], "parameters": report["parameters"], "seconds": time.perf_counter() - began,
                "peak_bytes": peak_memory()}
    from tersor.hf.rom.run import PRESETS, reduce_model

    rung = rom_cases.rung_of(case)
    recipe = dataclasses.replace(PRESETS[rung.preset], **rung.changes)
    how: dict[str, Any] = {"keep": case.level, "sequences": rom_cases.SEQUENCES}
    if case.kind == "equal":
        how = {"size": size_of(source, output.parent, case.level), "sequences": rom_cases.SEQUENCES}
    if case.kind == "cost":
        how = {"keep": float(case.method.rpartition(" ")[2]), "sequences": int(case.level)}
    began = time.perf_counter()
    report = reduce_model(source, output, recipe=recipe, seed=SEED, **how,
                          calibration=rom_data.calibration_file(case.calibration, output.parent))
    if report["recipe"] != recipe.to_json():
        raise RuntimeError(f"{case.key} asked for {recipe.to_json()}, but {report['recipe']} was run")
    numbers = {name: report[name] for name in KEPT_NUMBERS if name in report} | {"preset": rung.preset}
    return {**numbers, "seconds": time.perf_counter() - began, "peak_bytes": peak_memory(),
            "ranks": ranks(report["ranks"]), "layer_seconds": layer_seconds(report["layers"])}


def size_of(source: Path, folder: Path, bits: float) -> int:
    """Return the bytes of `bits` a parameter of a model."""
    return int(bits * open_source(source, folder / "staged").elements / 8)


def ranks(found: dict[str, int | None]) -> dict[str, dict[str, float]]:
    """Return the mean rank and the number of dense layers by kind of layer."""
    kinds: dict[str, list[int | None]] = {}
    for name, rank in found.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(rank)
    return {kind: {"mean": sum(r for r in of if r is not None) / max(1, sum(r is not None for r in of)),
                   "dense": sum(r is None for r in of)} for kind, of in kinds.items()}


def layer_seconds(layers: dict[str, dict[str, Any]]) -> list[float]:
    """Return the seconds of each layer, where the report has them."""
    return [float(layer["seconds"]) for layer in layers.values() if "seconds" in layer]


def known(case: Case) -> dict[str, Any] | None:
    """Return the numbers of a case that reads no calibration text, where it was measured under another one."""
    same = [line["numbers"] for line in common.newest(SUITE).values() if case.method == "svd"
            and {**line["case"], "calibration": case.calibration} == dataclasses.asdict(case)]
    return dict(same[0]) if same else None


def child(case: Case, source: Path, output: Path) -> dict[str, Any]:
    """Run `compress` in a process of its own; return its numbers, or what it failed with."""
    told = json.dumps({"case": dataclasses.asdict(case), "source": str(source), "output": str(output)})
    done = subprocess.run([sys.executable, __file__, "--child", told], capture_output=True, text=True,
                          timeout=CHILD_SECONDS, check=False)
    if done.returncode == REFUSED:
        return {"refused": done.stderr.strip().splitlines()[-1][:500]}
    if done.returncode:
        return {"failed": done.stderr[-3000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_child(told: str) -> None:
    """Be the process that compresses."""
    torch.set_num_threads(1)
    from tersor.errors import TersorError

    asked = json.loads(told)
    try:
        numbers = compress(Case(**asked["case"]), Path(asked["source"]), Path(asked["output"]))
    except TersorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    print(json.dumps(numbers, default=str))


def run(chosen: Sequence[Case], arguments: argparse.Namespace) -> None:
    """Measure cases of one model and write their lines."""
    source = models.locate(chosen[0].model, arguments.models)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        opened = open_source(source, folder / "dense")
        original = load_dense(opened).to(arguments.device)
        tokenizer = read_tokenizer(opened.folder)
        judge = rom_data.Judge(original, tokenizer, arguments.tokens, arguments.pairs)
        for case in chosen:
            began = time.perf_counter()
            told = known(case)
            if told is not None:
                common.record(SUITE, case, seed=SEED, nbytes=told["bytes"], numbers=told)
                continue
            output = Path(tempfile.mkdtemp(dir=folder))
            if case.kind == "dense":
                stored = sum(p.numel() for p in original.parameters())
                count = rom_data.macs(original)
                numbers = {"parameters": stored, "bytes": 2 * stored, "macs_per_token": count, "seconds": 0.0}
                numbers |= scores(judge, original)
            else:
                numbers = child(case, source, output / "model")
                if "failed" in numbers:
                    print(f"{case.key} FAILED\n{numbers['failed']}", flush=True)
                    continue
                if "refused" not in numbers and (case.kind != "cost" or arguments.evaluate):
                    numbers |= scores(judge, load_compressed(output / "model").to(arguments.device))
            numbers |= {"evaluation_tokens": arguments.tokens, "context": rom_data.CONTEXT,
                        "case_seconds": time.perf_counter() - began}
            common.record(SUITE, case, seed=SEED, nbytes=int(numbers.get("bytes", 0)), numbers=numbers)
            shutil.rmtree(output)
            print(said(case, numbers), flush=True)


def scores(judge: rom_data.Judge, model: Any) -> dict[str, Any]:
    """Return what the texts and BLiMP say of a model."""
    return {"texts": judge.texts_of(model), "blimp": judge.blimp(model)}


def said(case: Case, numbers: dict[str, Any]) -> str:
    """Return one line about a case."""
    if "texts" not in numbers:
        return f"{case.key}: {numbers.get('refused', 'done')} {numbers.get('seconds', 0):.0f} s"
    texts = numbers["texts"]
    return (f"{case.key}: KL house {texts['house']['kl']:.4f} wikitext {texts['wikitext']['kl']:.4f} perplexity "
            f"{texts['house']['perplexity']:.2f} {texts['wikitext']['perplexity']:.2f} BLiMP "
            f"{numbers['blimp']['accuracy']:.3f} kept {numbers.get('kept', 1):.4f} {numbers['bytes']} bytes "
            f"{numbers['seconds']:.0f} s {numbers.get('peak_bytes', 0) / 1e9:.2f} GB "
            f"({numbers['case_seconds']:.0f} s in all)")


def merge(file: Path) -> None:
    """Append the lines of a run elsewhere to bench/results, under the commit here, which it was a copy of."""
    with (common.RESULTS / f"{SUITE}.jsonl").open("a") as handle:
        for text in file.read_text().splitlines():
            handle.write(json.dumps({**json.loads(text), "commit": common.commit()}, ensure_ascii=False) + "\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_models_argument(found)
    found.add_argument("what", nargs="?", choices=("ladder", "equal-bytes", "cost"))
    found.add_argument("--source", default="fable-22m", choices=rom_cases.SOURCES)
    found.add_argument("--keep", nargs="+", type=float, default=list(rom_cases.KEEPS))
    found.add_argument("--calibration", nargs="+", choices=("in", "out"), default=["in", "out"])
    found.add_argument("--rungs", nargs="+", choices=tuple(RUNGS), default=list(RUNGS))
    found.add_argument("--sequences", nargs="+", type=int, default=list(rom_cases.COST_SEQUENCES), help="of cost cases")
    found.add_argument("--bits", nargs="+", type=float, default=list(rom_cases.BITS))
    found.add_argument("--methods", nargs="+", choices=tuple(EQUAL), default=list(EQUAL))
    found.add_argument("--tokens", type=int, default=4096, help="of each held-out text")
    found.add_argument("--pairs", type=int, default=20, help="of each phenomenon of BLiMP")
    found.add_argument("--device", default="cpu", help="of the evaluation; compressing is on the CPU")
    found.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every N-th case, from K")
    found.add_argument("--out", type=Path, help="folder for rom.jsonl, instead of bench/results")
    found.add_argument("--scratch", type=Path, help="folder for models while they are evaluated")
    found.add_argument("--evaluate", action="store_true", help="cost cases too")
    found.add_argument("--again", action="store_true", help="run cases that have a line too")
    found.add_argument("--merge", type=Path, metavar="FILE")
    found.add_argument("--child", help=argparse.SUPPRESS)
    return found


def select(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases asked for that have no line yet."""
    model = arguments.source
    sides = tuple(rom_cases.calibration_of(model, side) for side in arguments.calibration)
    chosen = {"ladder": lambda: rom_cases.ladder(model, tuple(arguments.keep), sides, tuple(arguments.rungs)),
              "equal-bytes": lambda: rom_cases.equal(model, tuple(arguments.bits), tuple(arguments.methods)),
              "cost": lambda: rom_cases.cost(model, 0.8, "plus_gauge", arguments.sequences)}[arguments.what]()
    done = () if arguments.again else common.newest(SUITE)
    first, step = arguments.shard
    return [case for case in chosen if case.key not in done][first::step]


def main() -> int:
    """Run what is asked for."""
    arguments = parser().parse_args()
    if arguments.child:
        run_child(arguments.child)
        return 0
    if arguments.merge:
        merge(arguments.merge)
        return 0
    if arguments.out:
        common.RESULTS = arguments.out
    torch.set_num_threads(1)
    chosen = select(arguments)
    if chosen:
        run(chosen, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

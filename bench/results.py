"""What every suite shares: where results go, and the provenance that every result line carries."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import tersor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TEXTS = ROOT / "bench" / "data"
DOMAINS = ("fiction", "speech", "technical")
PACKAGES = ("torch", "numpy", "transformers", "bitsandbytes", "hqq", "optimum-quanto", "torchao", "libgguf",
            "faiss-cpu")


@functools.cache
def commit() -> str:
    """Return the short commit, with `+dirty` when src/ or bench/ code differs from it; asked once, at import.

    A long run keeps the code that it loaded, whatever is committed while it goes on.
    """
    changed = _git("status", "--porcelain", "--", "src", "bench/*.py")
    return _git("rev-parse", "--short=10", "HEAD") + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:  # a device machine
        return "unknown"
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, Any]:
    """Return the processor's name, its cores as this process sees them, torch's threads, and the load on it now."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0]}


def versions() -> dict[str, str]:
    """Return the versions of Python, Tersor and every package in `PACKAGES` that is installed."""
    found = {"python": platform.python_version(), "tersor": tersor.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def record(suite: str, case: Any, *, seed: int, nbytes: int, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Append one result line to `bench/results/<suite>.jsonl` and return it.

    Parameters
    ----------
    suite : str
        File name without its suffix.
    case : dataclass
        The case's record; its `key` names the line, and a later line of the same key replaces an earlier one in tables.
    seed : int
    nbytes : int
        Every stored byte; 0 where nothing is stored.
    numbers : mapping
        What was measured; JSON-able.
    """
    line = {
        "suite": suite, "key": case.key, "case": dataclasses.asdict(case), "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "machine": rounded(machine()),
        "versions": versions(), "seed": seed, "bytes": nbytes, "numbers": rounded(numbers),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{suite}.jsonl").open("a") as handle:
        handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    return line


def rounded(value: Any) -> Any:
    """Return `value` with every float cut to six significant digits, in nested mappings and lists too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def newest(suite: str) -> dict[str, dict[str, Any]]:
    """Return the last line of each case of a suite, by key; empty without a results file."""
    file = RESULTS / f"{suite}.jsonl"
    if not file.is_file():
        return {}
    lines = [json.loads(text) for text in file.read_text().splitlines() if text.strip()]
    return {line["key"]: line for line in lines}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on `count` threads, then restore the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


commit()

"""Result lines: where they lie, what each says of its origin, and when none is written.

A line of `results/<suite>.jsonl` names a commit of the history, that of the code which was measured, or says "unknown".
So nothing is written from a working tree with changes. On a machine without git a line carries a digest of the code
instead; it gets its commit when it is merged into a clean tree of the same digest.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
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
from bench.markdown import UNKNOWN
from bench.places import RESULTS, ROOT
from bench.suite import RefusedError, Result

PACKAGES = ("torch", "numpy", "transformers", "bitsandbytes", "hqq", "optimum-quanto", "torchao", "libgguf",
            "faiss-cpu")
CODE = ("src", "bench")
SHORT = 10  # digits of a commit


def _git(*arguments: str, root: Path = ROOT) -> str | None:
    """Return what git prints, or None where there is no git, or no repository."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def changed(root: Path = ROOT) -> list[str]:
    """Return what `git status` lists, new files too; results themselves may differ."""
    listed = _git("status", "--porcelain", "--untracked-files=all", "--", ".", ":!bench/results", root=root)
    if listed is None:
        raise RefusedError(f"{root}: git cannot say which commit this tree is; use --out, then --merge in a clean tree")
    return listed.splitlines()


def clean_commit(root: Path = ROOT) -> str:
    """Return the commit that holds this very tree.

    Raises
    ------
    RefusedError
        If no commit does; names what differs.
    """
    differs = changed(root)
    if differs:
        told = ", ".join(line[3:] for line in differs[:5]) + (", …" if len(differs) > 5 else "")
        raise RefusedError(f"results are written from a clean tree only, since each line names the commit that was "
                           f"measured; commit or stash first: {told}")
    head = _git("rev-parse", f"--short={SHORT}", "HEAD", root=root)
    if not head:
        raise RefusedError(f"{root}: git names no commit")
    return head


def check_code(root: Path = ROOT) -> None:
    """Check that the package is imported from this tree, whose commit lines will name.

    Raises
    ------
    RefusedError
        If it is another one.
    """
    found = Path(tersor.__file__ or "")
    if not found.is_relative_to(root / "src"):
        raise RefusedError(f"tersor is imported from {found.parent}, not from {root / 'src'}; set PYTHONPATH=src")


def digest(root: Path = ROOT) -> str:
    """Return a digest of the code under src/ and bench/: names and bytes of every Python file, data of the package."""
    found = hashlib.sha256()
    for folder in CODE:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".npz") and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(root)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def machine(device: str = "") -> dict[str, Any]:
    """Return the processor's name (or the accelerator's, where that measured), cores, torch's threads, and the load."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {"cpu": device or name, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0]}


def versions() -> dict[str, str]:
    """Return the versions of Python, Tersor and every package in `PACKAGES` that is installed."""
    found = {"python": platform.python_version(), "tersor": tersor.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def rounded(value: Any) -> Any:
    """Return `value` with every float cut to six significant digits, in nested mappings and lists too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


class Recorder:
    """Appends result lines to a folder: bench/results, from a clean tree, or another one, from any.

    Parameters
    ----------
    folder : Path or None
        None: bench/results.

    Raises
    ------
    RefusedError
        If other code was imported, or lines would go to bench/results and no commit holds this tree.
    """

    def __init__(self, folder: Path | None = None) -> None:
        check_code()
        self.folder = folder or RESULTS
        # asked once: a long run keeps the code that it loaded
        self.origin = {"commit": clean_commit()} if folder is None else {"commit": UNKNOWN, "tree": digest()}
        self.folder.mkdir(parents=True, exist_ok=True)

    def record(self, suite: str, result: Result) -> dict[str, Any]:
        """Append one result line to `<suite>.jsonl` and return it."""
        line = {
            "suite": suite, "key": result.key, "case": dict(result.case), **self.origin,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "machine": rounded(machine(result.device)), "versions": versions(), "seed": result.seed,
            "bytes": result.nbytes, "numbers": rounded(result.numbers),
        }
        append(self.folder / f"{suite}.jsonl", [line])
        return line


def append(file: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a file."""
    with file.open("a") as handle:
        handle.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def merge(folder: Path, suite: str) -> int:
    """Append the lines of a run elsewhere under the commit here, whose code must be the same; return how many.

    Raises
    ------
    RefusedError
        If there are none, this tree has changes, or other code was measured.
    """
    file = folder / f"{suite}.jsonl"
    if not file.is_file():
        raise RefusedError(f"{file}: no lines of suite '{suite}' there")
    lines, commit, here = read(file), clean_commit(), digest()
    other = sorted({line.get("tree", "none") for line in lines} - {here})
    if other:
        raise RefusedError(f"{file}: lines of code with digest {', '.join(other)}; here it is {here}. Merge at the "
                           f"commit that was measured")
    for line in lines:
        del line["tree"]
        line["commit"] = commit
    append(RESULTS / file.name, lines)
    return len(lines)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file."""
    return [json.loads(text) for text in file.read_text().splitlines() if text.strip()]


def newest(suite: str, on: str = "") -> dict[str, dict[str, Any]]:
    """Return the last line of each case of a suite, by key, measured on machines with `on` in their names."""
    file = RESULTS / f"{suite}.jsonl"
    lines = read(file) if file.is_file() else []
    return {line["key"]: line for line in lines  # tilings of old have no key
            if "key" in line and on in line["machine"]["cpu"]}


def strangers(folder: Path = RESULTS) -> list[str]:
    """Return what is wrong with result files: lines that name no commit of the history, and do not say so.

    Raises
    ------
    RefusedError
        If there is no history to look them up in.
    """
    listed = _git("rev-list", "HEAD")
    if listed is None or _git("rev-parse", "--is-shallow-repository") == "true":
        raise RefusedError("commits of result lines are checked against a whole history, which is not here")
    history, found = listed.splitlines(), []
    for file in sorted(folder.glob("*.jsonl")):
        named = {line.get("commit", "") for line in read(file)} - {UNKNOWN}
        wrong = sorted(one for one in named if not one or not any(full.startswith(one) for full in history))
        found += [f"{file.name}: '{one}' is no commit of the history" for one in wrong]
    return found


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on `count` threads, then restore the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

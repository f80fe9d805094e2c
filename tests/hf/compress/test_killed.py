"""A run killed at any moment, and one whose work files are damaged, ends with the bytes of an unbroken one.

What is damaged may be refused instead, by an error of Tersor's own. Most tests kill forks of a process that has
imported all there is to import; one kills the command, which takes its seconds to start.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tersor.errors import DamagedWorkWarning, TersorError
from tersor.hf.compress import checkpoint, run
from tersor.hf.rom import run as rom
from tests.hf.compress.forks import Forks, Job, compress, hasten, reduce
from tests.hf.tiny import save_tiny, save_tokenizer

COMMAND = [sys.executable, "-m", "tersor", "compress"]
OPTIONS = ["--codec", "rot,lm3", "--rate", "6", "--tokens", "1024", "--context", "64", "--evaluation-tokens", "0"]
FILES = ("model.safetensors", "tersor.json", "config.json")

def staged(folder: Path, layers: int) -> Path:
    """Write a tiny model, in a form that has to be staged."""
    save_tiny("llama", folder, num_hidden_layers=layers)
    save_tokenizer(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return staged(tmp_path_factory.mktemp("killed") / "model", 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return staged(tmp_path_factory.mktemp("killed") / "small", 1)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def hastened(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((checkpoint, "EVERY"), (checkpoint, "SHARE"), (run, "verify_in_fresh_process"),
                         (rom, "verify_in_fresh_process")):
        monkeypatch.setattr(module, name, getattr(module, name))  # as they were, afterwards
    hasten()


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def kill_and_resume(forks: Forks, job: Job, source: Path, out: Path, kills: int, seed: int) -> int:
    """Kill a job at random moments until it was killed so often, and let it finish; return how often it had begun."""
    forks.start(job, source, out / "unbroken")
    began = time.perf_counter()
    assert forks.end() == 0
    whole, rng, killed, begun = time.perf_counter() - began, random.Random(seed), 0, 0
    while killed < kills:
        place = out / str(killed)
        for _ in range(rng.randint(1, 4)):  # several kills of one run, then let it finish
            child = forks.start(job, source, place)
            time.sleep(rng.uniform(0.02, 0.98) * whole)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            begun += place.with_name(f"{place.name}.work").exists()
            if forks.end() == 0:
                break
            killed += 1
            assert not place.exists() or (place / "tersor.json").exists()
        if not place.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("error", DamagedWorkWarning)  # a kill damages nothing
                job(source, place)
        assert contents(place) == contents(out / "unbroken")
        assert not [file.name for file in out.iterdir() if file.name.startswith(f".{place.name}.")]
    return begun


def flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def blank(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes(len(data[place : place + 64])) + data[place + 64 :]


def lengthen(data: bytes, rng: random.Random) -> bytes:
    return data + data[: 1 + rng.randrange(64)]


def snapshots(job: Job, source: Path, folder: Path, shares: dict[str, float]) -> list[Path]:
    """Interrupt a job once in each stage, when a share of it is done; return copies of the work folders."""
    found = []
    for stage, share in shares.items():
        def stop(now: str, done: int, total: int, stage: str = stage, share: float = share) -> None:
            if now == stage and done >= share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job(source, folder / "out", progress=stop)
        found.append(shutil.copytree(folder / "out.work", folder / f"{stage}.snapshot"))
    shutil.rmtree(folder / "out.work")
    return found


def damages(snapshot: list[Path], rng: random.Random) -> Iterator[tuple[Path, Path, str, bytes | None]]:
    """Yield damages without end: snapshot, file in it, kind, new contents (None: none); kinds of files take turns."""
    kinds: dict[str, list[tuple[Path, Path]]] = {}
    for folder in snapshot:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.stat().st_size:
                kinds.setdefault(file.relative_to(folder).parts[0], []).append((folder, file))
    while True:
        for places in kinds.values():
            folder, file = rng.choice(places)
            change = rng.choice([flip, flip, flip, cut, blank, lengthen, None])
            yield (folder, file.relative_to(folder), "gone" if change is None else change.__name__,
                   None if change is None else change(file.read_bytes(), rng))


def damage_and_resume(job: Job, source: Path, folder: Path, taken: list[Path], times: int, seed: int) -> Counter[str]:
    """Damage work files so often, and resume; return how often with the same bytes, after a word, or refused."""
    job(source, folder / "unbroken")
    expected, counts, out = contents(folder / "unbroken"), Counter[str](), folder / "out"
    for _, (snapshot, file, kind, data) in zip(range(times), damages(taken, random.Random(seed)), strict=False):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / "out.work", ignore_errors=True)
        shutil.copytree(snapshot, folder / "out.work")
        if data is None:
            (folder / "out.work" / file).unlink()
        else:
            (folder / "out.work" / file).write_bytes(data)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", DamagedWorkWarning)
            try:
                job(source, out)
            except TersorError:
                assert not out.exists()
                counts[f"{file.parts[0]}: refused"] += 1
                continue
        assert contents(out) == expected, f"{file} of {snapshot.name}, {kind}"
        said = any(issubclass(warning.category, DamagedWorkWarning) for warning in told)
        counts[f"{file.parts[0]}: made again, said so" if said else f"{file.parts[0]}: same bytes"] += 1
    return counts


STAGES = {"calibrate": 0.8, "survey": 0.75, "encode": 0.95}


def test_kill_9_three_times(forks: Forks, small: Path, tmp_path: Path) -> None:
    assert kill_and_resume(forks, compress, small, tmp_path, 3, 0) >= 2


def test_ten_damages(small: Path, tmp_path: Path) -> None:
    taken = snapshots(compress, small, tmp_path, STAGES)
    kinds = {file.relative_to(folder).parts[0] for folder in taken for file in folder.rglob("*") if file.is_file()}
    assert kinds == {"fingerprint", "status.json", "sensitivities.json", "sensitivities.json.part",
                     "survey.jsonl", "survey.jsonl.part", "survey.jsonl.outside", "plan.json", "encode.part",
                     "matrices"}
    counts = damage_and_resume(compress, small, tmp_path, taken, 10, 0)
    assert sum(counts.values()) == 10
    assert sum(number for what, number in counts.items() if "said so" in what or "refused" in what) >= 5, counts


@pytest.mark.slow
def test_kill_9_twenty_times(source: Path, tmp_path: Path) -> None:
    """Of the command, in a process of its own."""
    def command(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*COMMAND, str(source), str(out), *OPTIONS], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    began, rng, killed = time.perf_counter(), random.Random(0), 0
    assert command(tmp_path / "unbroken").wait() == 0
    whole = time.perf_counter() - began
    while killed < 20:
        out = tmp_path / str(killed)
        for _ in range(rng.randint(1, 4)):
            child = command(out)
            try:
                child.wait(timeout=rng.uniform(0.2, 0.98) * whole)
                break
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                killed += 1
                assert not out.exists() or (out / "tersor.json").exists()
        if not out.exists():
            assert command(out).wait() == 0
        assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("job", [compress, reduce])
def test_kill_9_of_forks_forty_times(job: Job, forks: Forks, source: Path, tmp_path: Path) -> None:
    assert kill_and_resume(forks, job, source, tmp_path, 40, 1) >= 15  # some are killed before they begin


@pytest.mark.slow
@pytest.mark.parametrize(("job", "stages"), [(compress, STAGES), (reduce, {"gradients": 1.0, "reduce": 0.6})])
def test_damages(job: Job, stages: dict[str, float], source: Path, tmp_path: Path) -> None:
    counts = damage_and_resume(job, source, tmp_path, snapshots(job, source, tmp_path, stages), 100, 2)
    print(dict(sorted(counts.items())))
    assert sum(counts.values()) == 100

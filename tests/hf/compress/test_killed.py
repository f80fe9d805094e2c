"""A run killed at any moment resumes to the bytes of an unbroken run."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fable import FABLE

COMMAND = [str(Path(sys.executable).parent / "tersor"), "compress", str(FABLE)]
OPTIONS = ["--rate", "3", "--tokens", "4096", "--evaluation-tokens", "0"]
KILLS = 20


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path: Path) -> None:
    began = time.perf_counter()
    subprocess.run([*COMMAND, str(tmp_path / "whole"), *OPTIONS], check=True, capture_output=True)
    whole = time.perf_counter() - began
    rng, killed = random.Random(0), 0
    while killed < KILLS:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(rng.randint(1, 4)):  # several kills of one run, then let it finish
            run = subprocess.Popen([*COMMAND, str(out), *OPTIONS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                run.wait(timeout=rng.uniform(0.3, 0.95) * whole)
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                killed += 1
                assert not out.exists() or (out / "tersor.json").exists()
        if not out.exists():
            subprocess.run([*COMMAND, str(out), *OPTIONS], check=True, capture_output=True)
        for file in ("model.safetensors", "tersor.json"):
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        shutil.rmtree(tmp_path / "out.work")

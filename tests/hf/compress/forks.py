"""Jobs on tiny models, and a process that imports once and forks one child a job, which can be killed at any moment."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tersor.hf.compress import checkpoint, run
from tersor.hf.compress.request import Sampling
from tersor.hf.compress.run import compress_model
from tersor.hf.compress.verify import verify
from tersor.hf.models.source import open_source
from tersor.hf.rom import run as rom
from tersor.hf.rom.recipe import PRESETS

Job = Callable[..., Any]
SETTINGS = {"method": "rot,lm3", "evaluation_tokens": 0, "sampling": Sampling(1024, 256, 64)}
START = "import sys; sys.path[:] = {path!r}; from tests.hf.compress.forks import serve; serve()"


def compress(source: Path, out: Path, **more: Any) -> None:
    compress_model(source, out, 6.0, **SETTINGS, **more)


def reduce(source: Path, out: Path, **more: Any) -> None:
    rom.reduce_model(source, out, 0.7, PRESETS["rom_plus"], sequences=16, length=32, **more)


def hasten() -> None:
    """Save sums after every batch, and verify in the same process."""
    checkpoint.EVERY, checkpoint.SHARE = 0.0, 1e9
    for module in (run, rom):
        module.verify_in_fresh_process = lambda path, against, *_: verify(
            path, open_source(against, path / "unused"), proven=False)


def serve() -> None:
    """Fork a child for every line of the input, and write its id and, when it has ended, its status."""
    torch.set_num_threads(1)
    hasten()
    gc.freeze()  # a child's collector would look through, and so copy, all that its parent has imported
    print("ready", flush=True)
    for line in sys.stdin:
        name, source, out = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                {"compress": compress, "reduce": reduce}[name](Path(source), Path(out))
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", START.format(path=sys.path)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, job: Job, source: Path, out: Path) -> int:
        """Start a job and return its process's id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([job.__name__, str(source), str(out)]) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait for the job and return its status: 0 if it ended well, the signal if it was killed."""
        return int(self._line())

    def close(self) -> None:
        with self._process:
            self._process.kill()

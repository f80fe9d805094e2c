"""Peers that need packages of their own: each is a script that an environment of its own runs (`setup.sh`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from bench.places import ROOT

ENVIRONMENTS = ROOT / ".venv-peers"
TOLD = 15  # lines of what a failed peer said
VERSIONS = "import importlib.metadata as m, sys; print(*[m.version(name) for name in sys.argv[1:]])"


class PeerError(Exception):
    """A peer's environment is not there, or the peer failed; the message says which."""


def run(script: str, environment: str, job: Mapping[str, Any]) -> None:
    """Run `bench/peers/SCRIPT.py` in an environment with a job, which names its output.

    Raises
    ------
    PeerError
        If the environment is missing, or the script fails; with what it said last.
    """
    python = _python(environment)
    done = subprocess.run([python, str(ROOT / "bench" / "peers" / f"{script}.py"), json.dumps(job, default=str)],
                          cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise PeerError("\n".join([f"{script}: status {done.returncode}", *done.stderr.splitlines()[-TOLD:]]))


def versions(environment: str, *packages: str) -> dict[str, str]:
    """Return the versions of an environment's packages."""
    done = subprocess.run([_python(environment), "-c", VERSIONS, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, done.stdout.split(), strict=True))


def _python(environment: str) -> str:
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        raise PeerError(f"{python}: no such environment; run: bash bench/peers/setup.sh {environment}")
    return str(python)

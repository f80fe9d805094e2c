"""What numba compiles is kept for as long as the sources that it is made of stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

OUTER = """
from tersor.numerics.machine import njit
from inner import SCALE, inner

@njit()
def outer(x):
    return SCALE * inner(x)
"""
INNER = """
from tersor.numerics.machine import njit

SCALE = {scale}

@njit()
def inner(x):
    return x + {more}
"""

# what has imported Tersor forks a child a change, which begins without the module, as another process would
CHANGES = """
import os
from pathlib import Path
import tersor.numerics.machine

for scale, more in ((2, 1), (3, 1), (3, 5)):
    Path("inner.py").write_text(Path("inner.txt").read_text().format(scale=scale, more=more))
    os.utime("inner.py", (scale, 10 * scale + more))  # files of one size, at different times
    child = os.fork()
    if child == 0:
        from outer import outer
        print(outer(1), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_change_beside_a_function_compiles_it_anew(tmp_path: Path) -> None:
    """A constant and a function of another file are compiled into it."""
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.txt").write_text(INNER)
    done = subprocess.run([sys.executable, "-c", CHANGES], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == [4, 6, 18]
    assert list(tmp_path.rglob("*.nbc"))

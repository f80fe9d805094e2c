"""What numba compiles is kept for as long as the sources that it is made of stay."""

from __future__ import annotations

import os
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


def test_a_change_beside_a_function_compiles_it_anew(tmp_path: Path) -> None:
    """A constant and a function of another file are compiled into it."""
    (tmp_path / "outer.py").write_text(OUTER)
    found = []
    for scale, more in ((2, 1), (3, 1), (3, 5)):
        (tmp_path / "inner.py").write_text(INNER.format(scale=scale, more=more))
        os.utime(tmp_path / "inner.py", (scale, 10 * scale + more))  # files of one size, at different times
        done = subprocess.run([sys.executable, "-c", "from outer import outer; print(outer(1))"], cwd=tmp_path,
                              capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    assert found == [4, 6, 18]

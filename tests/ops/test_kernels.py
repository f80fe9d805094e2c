"""Device code, read as text: what Triton asks of it and no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tersor import ops

KERNELS = sorted(Path(ops.__path__[0]).glob("*/kernels/*.py"))
FILES = [path for path in KERNELS if any(mark in path.read_text() for mark in ("triton.jit", "gluon.jit"))]


def jitted(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield what runs on the device."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            marks = {ast.unparse(mark).partition("(")[0] for mark in node.decorator_list}
            if marks & {"triton.jit", "gluon.jit"}:
                yield node


def returns(statements: list[ast.stmt]) -> bool:
    """Tell whether a return is among statements, or within them."""
    return any(isinstance(node, ast.Return) for statement in statements for node in ast.walk(statement))


def blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """Yield all blocks of statements."""
    for node in ast.walk(function):
        for name in ("body", "orelse"):
            found = getattr(node, name, None)
            if isinstance(found, list):
                yield found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_nothing_follows_a_branch_that_returns(path: Path) -> None:
    """Triton compiles what stands after an `if`, also where it has returned: so `else` is not superfluous there."""
    functions = list(jitted(path))
    assert functions
    wrong = [f"{function.name}, line {statement.lineno}" for function in functions for block in blocks(function)
             for statement in block if isinstance(statement, ast.If) and returns([statement])
             and not (statement is block[-1] and returns(statement.body) and returns(statement.orelse))]
    assert wrong == []

"""The command-line tool: argument parsing and printing only. Exit codes: 0 ok, 2 usage, 3 verification failed."""

from __future__ import annotations

import sys

import typer

from tersor.cli import image, kv, models, stores
from tersor.cli.base import app
from tersor.errors import TersorError


def main() -> None:
    """Run the tool; every expected error is one line on stderr."""
    try:
        app()
    except TersorError as error:
        _fail(error, error.exit_code)
    except (OSError, MemoryError) as error:
        _fail(error, 2)


def _fail(error: BaseException, code: int) -> None:
    typer.echo(f"tersor: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    sys.exit(code)


__all__ = ["app", "image", "kv", "main", "models", "stores"]

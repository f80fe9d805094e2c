"""The command-line tool: argument parsing and printing only. Exit codes: 0 ok, 2 usage, 3 verification failed."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from tersor.cli.image import image
from tersor.cli.kv import kv_plan
from tersor.cli.models import calibrate, compress, evaluate, families, plan, survey
from tersor.cli.reduce import reduce
from tersor.cli.stores import decode, encode, inspect, verify
from tersor.errors import TersorError

VERBS = (compress, evaluate, verify, inspect, decode, encode, image, kv_plan, reduce, calibrate, survey, plan, families)

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Tersor makes matrices terse: models and matrices in the fewest bytes for the least error.")
for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """Run the tool; every expected error is one line on stderr, and so is every warning."""
    warnings.showwarning = _tell
    try:
        app()
    except TersorError as error:
        _fail(error, error.exit_code)
    except (OSError, MemoryError) as error:
        _fail(error, 2)


def _tell(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning without the place in the code, which says nothing to a user."""
    del category, place
    typer.echo(f"tersor: warning: {' '.join(str(message).split())}", err=True)


def _fail(error: BaseException, code: int) -> None:
    typer.echo(f"tersor: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    sys.exit(code)

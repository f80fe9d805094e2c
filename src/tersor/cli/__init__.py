"""The command-line tool: argument parsing and printing only. Exit codes: 0 ok, 2 usage, 3 verification failed."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated

import typer

import tersor
from tersor.cli.funnel import INTERRUPTED, USAGE, Funnel, Verb
from tersor.cli.gguf import gguf
from tersor.cli.image import image
from tersor.cli.kv import kv_plan
from tersor.cli.models import calibrate, compress, evaluate, families, plan, status, survey
from tersor.cli.recover import recover
from tersor.cli.reduce import reduce
from tersor.cli.stores import decode, encode, inspect, verify
from tersor.cli.telling import LogFile, Quiet, Verbose, set_voice, spoken, tell_warning
from tersor.cli.vectors import app as vectors

VERBS = (compress, gguf, evaluate, verify, inspect, decode, encode, image, kv_plan, reduce, recover, calibrate, survey,
         plan, status, families)

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Tersor makes matrices terse: models and matrices in the fewest bytes for the least error.",
                  epilog="Exit codes: 0 ok; 1 a fault of Tersor; 2 a wrong path, option or input; 3 damaged, or "
                         "not what was encoded.")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tersor {tersor.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(ctx: typer.Context, quiet: Quiet = False, verbose: Verbose = False, log_file: LogFile = None,
           version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                 help="print the version")] = False) -> None:
    """Take what stands before the verb; without a verb, show the help."""
    del version
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(USAGE)
    set_voice(quiet, verbose, log_file)


for verb in VERBS:
    app.command(cls=Verb)(spoken(verb))
app.add_typer(vectors, name="vectors")


def main() -> None:
    """Run the tool; whatever goes wrong is one line on stderr."""
    with warnings.catch_warnings(), Funnel():
        warnings.showwarning = tell_warning
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a result is not lost for a name that cannot be shown
        code = app(prog_name="tersor", standalone_mode=False)
        if code == INTERRUPTED:  # typer has kept the interruption to itself
            raise KeyboardInterrupt
        sys.exit(code)

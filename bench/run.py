"""Runs benchmarks: `python bench/run.py SUITE [WORD …]`. bench/README.md explains suites.

Without --write or --out results are printed only. Exit status 1 if a target is missed or a case failed, 2 if refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder, which Python puts first, holds no top-level modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import results, suites
from bench.places import MODELS
from bench.suite import Asked, Outcome, RefusedError, Result, Suite, chosen

LONG, MOST = 60, 3  # characters of a text, numbers of a mapping, that are printed


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("suite", nargs="?", help="see --list")
    found.add_argument("words", nargs="*", metavar="WORD",
                       help="run the cases whose key holds every word; of a word 'a/b' one of its parts; "
                            "a part that ends in $ is a key's end")
    found.add_argument("--list", action="store_true", help="list the suites, or a suite's cases, and measure nothing")
    found.add_argument("--write", action="store_true", help="append lines to bench/results; from a clean tree only")
    found.add_argument("--missing", action="store_true", help="leave out cases that have a line in bench/results")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--threads", type=int, metavar="N", help="torch's threads; the suite's own number else")
    found.add_argument("--out", type=Path, metavar="DIR", help="append lines there instead, of any tree")
    found.add_argument("--merge", type=Path, metavar="DIR", help="append the lines of --out DIR to bench/results")
    found.add_argument("--models", type=Path, default=MODELS, metavar="DIR", help="where fable-7m and fable-22m lie")
    found.add_argument("--check", action="store_true", help="check that result lines name commits of the history")
    return found


def listed(suite: Suite | None, words: Iterable[str], device: str) -> None:
    """Print the suites, or the cases of one."""
    if suite is not None:
        for case in chosen(suite.cases(device), words):
            print(case.key)
        return
    for one in suites.every():
        lacking = one.lacking()
        print(f"{one.name:<16} {len(one.cases(device)):>4} cases  {one.what}"
              f"{'; lacks ' + ', '.join(lacking) if lacking else ''}")


def told(numbers: Mapping[str, Any]) -> str:
    """Return numbers for the eye: no lists, no long texts; of mappings within, the first few, by both names."""
    parts = []
    for name, value in results.rounded(numbers).items():
        if isinstance(value, Mapping):
            parts += [f"{name}.{one}" for one in told(value).split("  ")[:MOST] if one]
        elif not isinstance(value, list):
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {str(value)[:LONG]}")
    return "  ".join(parts)


def said(outcome: Outcome) -> str:
    """Return one line about an outcome."""
    if not isinstance(outcome, Result):
        return f"{'FAILED' if outcome.failed else 'left out'}  {outcome.key}: {outcome.why}"
    judged = {"passed", "red"} & outcome.numbers.keys() and outcome.numbers.get("passed", True) is not None
    verdict = "MISSED" if outcome.missed else "pass" if judged else "    "
    numbers = {name: value for name, value in outcome.numbers.items() if name not in ("passed", "red")}
    return f"{verdict}  {outcome.key}  {told(numbers)}"


def measured(suite: Suite, words: Iterable[str], arguments: argparse.Namespace) -> int:
    """Measure the cases asked for; return how many missed a target or failed."""
    lacking = suite.lacking()
    if lacking:
        raise RefusedError(f"suite '{suite.name}' needs {', '.join(lacking)}; bash bench/setup.sh installs them")
    cases = chosen(suite.cases(arguments.device), words)
    if arguments.missing:
        held = results.newest(suite.name)
        cases = [case for case in cases if case.key not in held]
    recorder = results.Recorder(arguments.out) if arguments.write or arguments.out else None
    missed = count = 0
    with results.threads(arguments.threads or suite.threads):
        for outcome in suite.measure(cases, Asked(arguments.device, arguments.models, arguments.out)):
            count += 1
            if isinstance(outcome, Result):
                missed += outcome.missed
                if recorder is not None:
                    recorder.record(suite.name, outcome)
            else:
                missed += outcome.failed
            print(said(outcome), flush=True)
    print(f"{suite.name}: {len(cases)} cases, {count} results, {missed} missed or failed")
    return missed


def main(given: list[str] | None = None) -> int:
    """Do what the command line asks for."""
    arguments = parser().parse_intermixed_args(given)
    try:
        if arguments.check:
            wrong = results.strangers()
            print("\n".join(wrong) if wrong else "every result line names a commit of the history, or says unknown")
            return 1 if wrong else 0
        suite = suites.named(arguments.suite) if arguments.suite else None
        if arguments.list or suite is None:
            listed(suite, arguments.words, arguments.device)
        elif arguments.merge:
            print(f"{results.merge(arguments.merge, suite.name)} lines appended to bench/results/{suite.name}.jsonl")
        else:
            if arguments.write and arguments.out:
                raise RefusedError("--write and --out say two places; take one")
            return 1 if measured(suite, arguments.words, arguments) else 0
    except RefusedError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

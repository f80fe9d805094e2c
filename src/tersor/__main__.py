"""`tersor` and `python -m tersor`: the command-line tool, if what it needs is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the tool, or say what to install."""
    try:
        from tersor.cli import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(f"tersor: the command-line tool needs '{error.name}'; install tersor[hf]\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()

"""The table of attacks: `python -m tests.hostile.campaign [mutants a kind] [part of a kind's name]`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.hostile.judge import GOOD, expected, judge
from tests.hostile.kinds import EVERY


def main(count: int, part: str = "", first: int = 0) -> int:
    """Try so many mutants of every kind; print a row a kind and the first faults; return 1 if there are any."""
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        for name, kind in EVERY.items():
            if part not in name:
                continue
            sound, began, seen, shown = Path(place) / name.replace("/", "_"), time.perf_counter(), Counter(), Counter()
            sound.mkdir()
            kind.make(sound)
            assert expected(kind, sound) or name == "npz"
            for seed in range(first, first + count):
                found = judge(kind, sound, Path(place) / "mutant", seed)
                seen[found.verdict] += 1
                if found.verdict not in GOOD:
                    bad += 1
                    mark = found.detail.strip().split("\n")[-1][:60]
                    shown[mark] += 1
                    if shown[mark] <= 1:
                        print("  ", found.verdict, found.detail, flush=True)
            row = "  ".join(f"{verdict} {seen[verdict]}" for verdict in (*GOOD, "silent", "untyped", "hang"))
            print(f"{name:34} {count:6}  {row}  {time.perf_counter() - began:.0f} s", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2] if len(sys.argv) > 2 else "",
                  int(sys.argv[3]) if len(sys.argv) > 3 else 0))

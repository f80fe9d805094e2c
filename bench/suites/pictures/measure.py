"""Photographs through `tersor.images`: PSNR by family, layout and bits a sample, every stored byte counted."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from tersor import images, store
from tersor.errors import TersorError

SEED = 0
FOLDER = common.ROOT.parent / "shared" / "data" / "images"
FILES = ("kodim05", "kodim13", "kodim23")
METHODS = ("scalar", "uniform", "qet_plus", "opq", "lplr", "lsvd", "dsvd", "lplr_plus")
RATES = (1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class PictureCase:
    """One photograph by one family in one layout.

    Parameters
    ----------
    file : str
    method : str
        A family.
    layout : str
        One of `tersor.images.LAYOUTS`.
    rate : float
        Most bits a sample.
    """

    file: str
    method: str
    layout: str
    rate: float

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.file}|{self.rate:g}|{self.layout}|{self.method}"


CASES = tuple(PictureCase(file, method, layout, rate) for rate in RATES for method in METHODS
              for layout in images.LAYOUTS for file in FILES)


def run(case: PictureCase, folder: Path) -> dict[str, Any]:
    """Return PSNR, error, bytes and seconds of one case."""
    original = images.read(FOLDER / f"{case.file}.png")
    start = time.process_time()
    encoded = images.encode(original, case.rate, case.method, channels=case.layout, seed=SEED)
    seconds = time.process_time() - start
    nbytes = encoded.save(folder)
    assert nbytes == store.stored_nbytes(folder)
    found = images.compare(original, images.load(folder).image())
    return {**found, "bytes": nbytes, "rate": 8 * nbytes / original.samples.size, "encode_s": seconds,
            "codec": " ".join(dict.fromkeys(str(e.codec) for e in encoded.matrices.values()))}


def measure(cases: Sequence[PictureCase], *, write: bool) -> Iterator[tuple[PictureCase, dict[str, Any]]]:
    """Yield each case and its numbers, and record them if asked to."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                numbers = run(case, Path(folder) / "out")
            except TersorError as problem:
                yield case, {"cannot": str(problem)}
                continue
        if write:
            common.record("pictures", case, seed=SEED, nbytes=numbers["bytes"], numbers=numbers)
        yield case, numbers


def main() -> int:
    """Run the cases whose key contains any of the words given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run only cases whose key contains one of these")
    parser.add_argument("--write", action="store_true", help="append to bench/results/pictures.jsonl")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if not arguments.words or any(word in case.key for word in arguments.words)]
    with common.threads(1):
        for case, numbers in measure(chosen, write=arguments.write):
            print(case.key, common.rounded(numbers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

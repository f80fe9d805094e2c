"""Photographs through `tersor.images`: PSNR by family, layout and bits a sample, every stored byte counted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.places import SHARED
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.pictures.cases import PictureCase
from tersor import images, store
from tersor.errors import TersorError

SEED = 0
FOLDER = SHARED / "images"


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


def measure(cases: Sequence[PictureCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case."""
    del asked
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                numbers = run(case, Path(folder) / "out")
            except TersorError as problem:
                yield Unmeasured(case.key, str(problem))
                continue
        yield Result.of(case, numbers["bytes"], numbers, seed=SEED)

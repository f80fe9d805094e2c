"""Sensitivities, and how errors of rows add up, in one pass before anything is encoded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tersor.errors import CorruptStoreError
from tersor.hf.compress import calibrate
from tersor.hf.compress.reading import Reading
from tersor.hf.compress.request import Progress
from tersor.hf.compress.sides import TOKENS, Sides, gathering, read
from tersor.planning.calibration import Calibration


def measured(reading: Reading, traces: Path, folder: Path, progress: Progress) -> tuple[Calibration, Sides]:
    """Measure sensitivities and, in the same pass, the moments of gradients; what is there already is taken.

    Raises
    ------
    CorruptStoreError
        If a file of moments was damaged while others were made; the next run makes all of them again.
    """
    sampling = reading.sampling
    if not sampling.fisher_tokens:
        return calibrate.sensitivities(reading, traces, progress), Sides({})
    wanted = max(sampling.fisher_tokens, min(sampling.tokens, TOKENS))
    reading = dataclasses.replace(reading, sampling=dataclasses.replace(sampling, fisher_tokens=wanted,
                                                                           fisher_context=sampling.context))
    fisher = gathering(folder, reading.mark)
    if traces.exists() and read(folder, reading.mark) is None:
        traces.unlink()
    known = calibrate.sensitivities(reading, traces, progress, fisher=fisher)
    found = read(folder, reading.mark)
    if found is None:
        traces.unlink()
        raise CorruptStoreError(f"{folder}: a file of it is damaged; run again, and all of them are made again")
    return known, found

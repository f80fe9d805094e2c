"""Synthetic matrices: error against rate, speed beside a copy, peak memory."""

from bench.suite import Suite, always, deferred
from bench.suites.matrices import cases, tables

SUITES = (
    Suite("gaussian", "error of 4096 x 4096 synthetic matrices beside peers; 2 minutes", always(cases.MATRIX_CASES),
          deferred("bench.suites.matrices.gaussian"), tables.GAUSSIAN),
    Suite("speed", "encoding, decoding, packing as multiples of a copy, and peak memory; 1 minute on an idle machine",
          always((*cases.SPEED_CASES, *cases.MEMORY_CASES)), deferred("bench.suites.matrices.speed"), tables.SPEED,
          threads=2),
)

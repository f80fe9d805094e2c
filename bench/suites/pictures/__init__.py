"""Photographs."""

from bench.suite import Suite, always, deferred
from bench.suites.pictures import cases, tables

SUITES = (
    Suite("pictures", "PSNR by family, layout and bits a sample", always(cases.CASES),
          deferred("bench.suites.pictures.measure"), tables.TABLES),
)

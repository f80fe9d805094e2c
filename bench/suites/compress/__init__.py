"""Whole compressions: what the dry run foretells beside what is measured, and several devices beside one."""

from bench.suite import Suite, always, deferred
from bench.suites.compress import cases, tables

SUITES = (
    Suite("foretold", "peak memory and seconds of three models beside the dry run's",
          always(cases.FORETOLD), deferred("bench.suites.compress.measure", "foretold"), tables.TABLES),
    Suite("room", "peak memory and seconds of whole compressions on two threads, beside what they may take",
          always(cases.ROOM), deferred("bench.suites.compress.measure", "room")),
    Suite("devices", "seconds by stage and bytes on one device and several; on GPUs, four blocks of an 8B shape",
          lambda device: cases.DEVICES[device], deferred("bench.suites.compress.measure", "devices")),
)

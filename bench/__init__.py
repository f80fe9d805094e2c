"""Benchmarks: suites of cases, result lines, and the tables made of them; not part of the package."""

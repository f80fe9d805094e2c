"""One budget over many matrices; what calibration saw of them, and what was measured."""

"""One budget over many matrices, and what calibration saw of them."""

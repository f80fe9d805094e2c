"""Which products are taken, and how they are cut: configurations as data."""

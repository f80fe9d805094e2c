"""Device code of `attend_one`."""

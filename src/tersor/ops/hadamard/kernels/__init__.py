"""Device code of rotations."""

"""Device code of the best path through a trellis."""

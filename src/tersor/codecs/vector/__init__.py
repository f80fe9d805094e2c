"""One code a run of elements."""

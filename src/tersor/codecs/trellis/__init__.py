"""Trellis codes: a sliding window over a stream of bits gives every number."""

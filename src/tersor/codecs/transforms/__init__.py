"""Codecs that change the matrix and leave its coding to an inner codec."""

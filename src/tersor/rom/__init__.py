"""Reduced linears: least error, ranks, how factors are stored."""

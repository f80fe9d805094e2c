"""Two bases: a matrix as the sum of what is flat in one and what is flat in the other."""

"""Mathematics that knows no codec: random numbers, linear algebra, rotations, k-means."""

"""Integer grids: matrices as whole numbers of a few bits times scales, as compressed-tensors stores them."""

"""From a model to integer grids in the format of compressed-tensors: what may be encoded, the stages, and the run."""

"""From a model to a GGUF file of a given size: sources, what calibration says of their tensors, and the run."""

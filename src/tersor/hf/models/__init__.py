"""Facts of transformers: checkpoints, names, shapes, text, evaluation."""

"""Recovery: what is continuous in a compressed model is trained until it does what its original does."""

"""LLM-ROM: reduced linears for a whole model."""

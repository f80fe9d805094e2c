"""Compressed caches of transformers models."""

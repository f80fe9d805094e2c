"""Compressed vector sets with the verbs of FAISS."""

from tersor.vectors.choice import index_families
from tersor.vectors.index import Index

__all__ = ["Index", "index_families"]

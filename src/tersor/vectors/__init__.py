"""Compressed vector sets with the verbs of FAISS."""

from tersor.vectors.index import Index
from tersor.vectors.rowwise import index_families

__all__ = ["Index", "index_families"]

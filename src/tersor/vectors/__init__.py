"""Compressed vector sets with the verbs of FAISS."""

from tersor.vectors.building import fill
from tersor.vectors.choice import index_families
from tersor.vectors.exporting import to_faiss
from tersor.vectors.index import Index
from tersor.vectors.sources import open_vectors

__all__ = ["Index", "fill", "index_families", "open_vectors", "to_faiss"]

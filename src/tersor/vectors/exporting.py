"""An index as one of FAISS: for programs that have FAISS and not Tersor."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from tersor.codecs import LearnedRotation, Product
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.payload import codes
from tersor.vectors.index import Index

CHUNK = 1 << 14  # vectors that are decoded at a time


def to_faiss(index: Index) -> Any:
    """Return a FAISS index with the same vectors under the same ids; `faiss.write_index` writes it.

    Product codes of 16 or 256 words go over as they are, behind a learned rotation or not, in lists or not (`nprobe`
    too). All others are decoded, and kept as float16, without lists. Cosine becomes the inner product of unit vectors:
    queries must have length 1.

    Raises
    ------
    CodecConfigError
        If faiss is missing, or the index is empty.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise CodecConfigError("index: an export to FAISS needs the package faiss: pip install faiss-cpu") from error
    if not len(index):
        raise CodecConfigError("index: it is empty; add vectors before exporting")
    index._held.whole()
    metric = faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if index.nlist and _is_product(index):
        return _in_lists(faiss, index, metric)
    found = _product(faiss, index, metric) or _decoded(faiss, index, metric)
    ids = index.ids.numpy()
    if np.array_equal(ids, np.arange(len(ids))):
        return found
    found.ntotal = 0  # it must look empty to be wrapped
    named = faiss.IndexIDMap2(found)
    found.ntotal = len(ids)
    faiss.copy_array_to_vector(ids.astype(np.int64), named.id_map)
    named.construct_rev_map()
    named.ntotal = len(ids)
    return named


def _decoded(faiss: Any, index: Index, metric: int) -> Any:
    """Return decoded vectors in float16."""
    found = faiss.IndexScalarQuantizer(index.dim, faiss.ScalarQuantizer.QT_fp16, metric)
    for part in index.ids.split(CHUNK):
        rows = torch.as_tensor(index.reconstruct(part))
        if index.metric == "cosine":
            rows = torch.nn.functional.normalize(rows, dim=1)
        found.add(np.ascontiguousarray(rows.numpy()))
    return found


def _inner(index: Index) -> Any:
    return index.codec.inner if isinstance(index.codec, LearnedRotation) else index.codec


def _is_product(index: Index) -> bool:
    """Tell whether codes are product codes that FAISS has."""
    codec = _inner(index)
    return (isinstance(codec, Product) and codec.words in (16, 256) and codec.scope == "group"
            and index.metric != "cosine")


def _product(faiss: Any, index: Index, metric: int) -> Any:
    """Return product codes as they are; None where there are none that FAISS has."""
    if not _is_product(index):
        return None
    found = faiss.IndexPQ(index.dim, *_shape(index), metric)
    rotation = _with_books(faiss, index, found)
    held = _all_codes(index)
    faiss.copy_array_to_vector(held.ravel(), found.codes)
    found.ntotal = len(held)
    return found if rotation is None else faiss.IndexPreTransform(_turn(faiss, rotation), found)


def _in_lists(faiss: Any, index: Index, metric: int) -> Any:
    """Return product codes of what centroids leave, in FAISS' lists, which hold ids as well."""
    held = index._held
    assert held.lists is not None
    books = faiss.IndexFlat(index.dim, metric)
    found = faiss.IndexIVFPQ(books, index.dim, index.nlist, *_shape(index), metric)
    rotation = _with_books(faiss, index, found)
    near = held.lists.centroids.numpy()  # FAISS rotates before it looks for lists
    books.add(np.ascontiguousarray(near if rotation is None else near @ rotation.T))
    found.own_fields, found.by_residual, found.nprobe = True, True, min(index.nprobe, index.nlist)
    books.this.disown()
    places = torch.cat([block.places for block in held.blocks if block.places is not None]).numpy()
    codes_of, ids = _all_codes(index), held.ids.numpy()
    for place in np.unique(places).tolist():
        inside = np.flatnonzero(places == place)
        own, words = ids[inside], codes_of[inside]  # FAISS takes addresses, which must stay while it copies
        found.invlists.add_entries(place, len(inside), faiss.swig_ptr(own), faiss.swig_ptr(words))
    found.ntotal = len(ids)
    found.precompute_table()
    if rotation is None:
        return found
    turned = faiss.IndexPreTransform(_turn(faiss, rotation), found)
    turned.ntotal = len(ids)
    return turned


def _shape(index: Index) -> tuple[int, int]:
    """Return the sub-vectors of a vector, and the bits of a code."""
    codec = _inner(index)
    return index.dim // codec.dim, codec.words.bit_length() - 1


def _with_books(faiss: Any, index: Index, found: Any) -> np.ndarray | None:
    """Give an index of FAISS the codebooks; return the rotation before them."""
    rotation, inner = _apart(index._held.blocks[0].encoded)
    books = _inner(index).codewords(inner.tensors, index.dim).contiguous().numpy()
    faiss.copy_array_to_vector(books.ravel(), found.pq.centroids)
    found.is_trained = True
    return rotation


def _turn(faiss: Any, rotation: np.ndarray) -> Any:
    turn = faiss.LinearTransform(*rotation.shape, False)
    faiss.copy_array_to_vector(rotation.ravel(), turn.A)
    turn.is_trained, turn.is_orthonormal = True, True
    return turn


def _all_codes(index: Index) -> np.ndarray:
    """Return all codes in the order of addition, uint8 (n, bytes)."""
    groups = _shape(index)[0]
    return np.concatenate([_codes(_apart(block.encoded)[1], _inner(index), groups) for block in index._held.blocks])


def _apart(encoded: Encoded) -> tuple[np.ndarray | None, Encoded]:
    """Return the rotation, if there is one, and what it is around."""
    if not isinstance(encoded.codec, LearnedRotation):
        return None, encoded
    rotation = encoded.tensors["rotation"].to(torch.float32).contiguous().numpy()
    return rotation, encoded.codec.child(encoded)


def _codes(encoded: Encoded, codec: Product, groups: int) -> np.ndarray:
    """Return codes as FAISS has them, uint8: of 16 words two in a byte, the lower bits first."""
    found = codes.read(encoded.tensors["codes"], (encoded.shape[0], groups), codec.words, slice(0, encoded.shape[0]))
    wide = found.to(torch.uint8).numpy()
    if codec.words == 256:
        return wide
    wide = np.pad(wide, ((0, 0), (0, wide.shape[1] % 2)))
    return wide[:, ::2] | wide[:, 1::2] << 4

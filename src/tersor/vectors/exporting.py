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

    Product codes of 16 or 256 words, behind a learned rotation or not, go over as they are, without lists. All others
    are decoded, and kept as float16. Cosine becomes the inner product of unit vectors: queries must have length 1.

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
    metric = faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT
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


def _product(faiss: Any, index: Index, metric: int) -> Any:
    """Return product codes as they are; None where there are none that FAISS has."""
    codec = index.codec.inner if isinstance(index.codec, LearnedRotation) else index.codec
    sound = isinstance(codec, Product) and codec.words in (16, 256) and codec.scope == "group"
    if not sound or index.nlist or index.metric == "cosine":
        return None
    assert isinstance(codec, Product)
    blocks = [block.encoded for block in index._held.blocks]
    rotation, inner = _apart(blocks[0])
    groups, bits = index.dim // codec.dim, codec.words.bit_length() - 1
    found = faiss.IndexPQ(index.dim, groups, bits, metric)
    books = codec.codewords(inner.tensors, index.dim).contiguous().numpy()
    faiss.copy_array_to_vector(books.ravel(), found.pq.centroids)
    found.is_trained = True
    held = np.concatenate([_codes(_apart(block)[1], codec, groups) for block in blocks])
    faiss.copy_array_to_vector(held.ravel(), found.codes)
    found.ntotal = len(held)
    if rotation is None:
        return found
    turn = faiss.LinearTransform(index.dim, index.dim, False)
    faiss.copy_array_to_vector(rotation.ravel(), turn.A)
    turn.is_trained, turn.is_orthonormal = True, True
    return faiss.IndexPreTransform(turn, found)


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

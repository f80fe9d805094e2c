"""Peers and our own codecs behind one call: a method and a matrix to the decoded matrix and all its stored bytes.

Methods are strings:

* a codec string (`rot,lm3`, `rtn2g64`, …): Tersor's codec; the `rtn` ones are the plain round-to-nearest baselines.
  Counted: the payload.
* `tersor:FAMILY@RATE`: `tersor.compress` at a rate. Counted: the payload.
* `nf4:BLOCK`: bitsandbytes NF4 without double quantization. Counted: codes, an fp32 absmax a block.
* `hqq:BITSgGROUP`: HQQ with its optimizer, groups along the inputs. Counted: codes as it packs them (ten 3-bit codes in
  four bytes), fp16 scale and zero a group.
* `quanto:BITSgGROUP[hqq]`: optimum-quanto with its max or its HQQ optimizer. Counted: packed codes, bf16 scale and
  shift a group.
* `torchao:BITSgGROUP`: torchao `IntxWeightOnlyConfig`, symmetric. Counted: BITS a code (it holds them in int8), a bf16
  scale a group.
* `gguf:TYPE`: llama.cpp's quantizer, uniform importance; its own fallback where 256 does not divide the width. Counted:
  its blocks, as they lie in a file.
* `faiss:sq4`, `faiss:edenBITS`: FAISS scalar quantizers. Counted: codes, trained ranges; for EDEN an fp32 RMS a row.
* `faiss:pq@RATE`, `faiss:opq@RATE`, `faiss:rq@RATE`, `faiss:lsq@RATE`: FAISS product quantization, the same after its
  learned rotation, and its product residual and local-search quantizers, at settings that fit RATE bits an element; the
  best of those tried (see `_faiss_settings`). Counted: codes; codebooks and rotation as if in fp16, half of what FAISS
  writes.

Constant tables (NF4's 16 levels, the grids of IQ types, Lloyd-Max tables) belong to the decoder and are not counted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import tersor

_MODULES = {"nf4": "bitsandbytes", "hqq": "hqq", "quanto": "optimum.quanto", "torchao": "torchao", "gguf": "libgguf",
            "faiss": "faiss"}


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A matrix after a round trip: float32 (out, in), and the bytes it took, everything stored counted.

    `detail` names the setting, where a method chose one.
    """

    matrix: Tensor
    nbytes: int
    detail: str = ""


class PeerMissingError(RuntimeError):
    """The package of a peer is not installed."""


class CannotRunError(RuntimeError):
    """A peer has no setting that fits the budget."""


def quantize(method: str, matrix: Tensor, seed: int = 0) -> Decoded:
    """Encode and decode `matrix` (out, in), float32.

    Raises
    ------
    PeerMissingError
        If the peer's package is not installed here.
    CannotRunError
        If a peer has no setting that fits the rate.
    """
    head, _, rest = method.partition(":")
    if not rest:
        encoded = tersor.compress(matrix, codec=method, seed=seed)
        return Decoded(encoded.decode(), encoded.nbytes, encoded.codec.spec())
    if head == "tersor":
        family, rate = rest.split("@")
        encoded = tersor.compress(matrix, rate=float(rate), codec=family, seed=seed)
        return Decoded(encoded.decode(), encoded.nbytes, encoded.codec.spec())
    if not available(method):
        raise PeerMissingError(f"{method}: package {_MODULES[head]} is not installed; run bench/setup.sh")
    with torch.no_grad():
        return _PEERS[head](matrix.contiguous(), rest)


def available(method: str) -> bool:
    """Tell whether the package that a method needs is installed."""
    head, _, rest = method.partition(":")
    if not rest or head == "tersor":
        return True
    module = _MODULES[head]
    top = module.split(".")[0]
    return importlib.util.find_spec(top) is not None and importlib.util.find_spec(module) is not None


def _bits_and_group(text: str) -> tuple[int, int, str]:
    match = re.fullmatch(r"(\d+)g(\d+)(\w*)", text)
    if match is None:
        raise ValueError(f"expected BITSgGROUP, found '{text}'")
    return int(match[1]), int(match[2]), match[3]


def _held(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _nf4(matrix: Tensor, rest: str) -> Decoded:
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(matrix, blocksize=int(rest), quant_type="nf4", compress_statistics=False)
    return Decoded(bnb.dequantize_4bit(codes, state).to(torch.float32), _held(codes, state.absmax))


def _hqq(matrix: Tensor, rest: str) -> Decoded:
    from hqq.core.quantize import Quantizer

    bits, group, _ = _bits_and_group(rest)
    codes, meta = Quantizer.quantize(matrix, nbits=bits, group_size=group, axis=1, device="cpu",
                                     compute_dtype=torch.float32)
    scale, zero = meta["scale"].to(torch.float16), meta["zero"].to(torch.float16)
    meta |= {"scale": scale.to(torch.float32), "zero": zero.to(torch.float32)}
    return Decoded(Quantizer.dequantize(codes, meta).to(torch.float32), _held(codes, scale, zero))


def _quanto(matrix: Tensor, rest: str) -> Decoded:
    from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4, quantize_weight

    bits, group, optimizer = _bits_and_group(rest)
    kind = {2: qint2, 4: qint4}[bits]
    base = matrix.to(torch.bfloat16)
    scale, shift = (HqqOptimizer() if optimizer else MaxOptimizer())(base, kind, 0, group)
    held = quantize_weight(base, kind, 0, scale, shift, group_size=group, optimized=False)
    return Decoded(held.dequantize().to(torch.float32), _held(held._data._data, held._scale, held._shift))


def _torchao(matrix: Tensor, rest: str) -> Decoded:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    bits, group, _ = _bits_and_group(rest)
    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight.copy_(matrix)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group)))
    held = layer.weight
    if bool(held.zero_point.any()):
        raise ValueError("torchao: expected a symmetric grid without zero points")
    packed = -(-matrix.numel() * bits // 8)
    return Decoded(held.dequantize().to(torch.float32), packed + _held(held.scale))


# llama.cpp's own choice for widths that its 256-element super-blocks do not divide
_GGUF_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ2_XXS": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ4_XS": "IQ4_NL",
                  "Q4_K": "Q5_0"}


def _gguf(matrix: Tensor, rest: str) -> Decoded:
    import libgguf
    import numpy as np

    columns = matrix.shape[1]
    kind = libgguf.GGMLQuantizationType[rest if columns % 256 == 0 else _GGUF_FALLBACK[rest]]
    blocks = libgguf.quantize_rows(matrix.numpy(), kind, np.ones(columns, np.float32))
    decoded = torch.from_numpy(np.array(libgguf.dequantize_rows(blocks, kind), np.float32))
    return Decoded(decoded.reshape(matrix.shape), blocks.nbytes)


def _faiss(matrix: Tensor, rest: str) -> Decoded:
    import faiss

    if "@" in rest:
        kind, rate = rest.split("@")
        return _faiss_vectors(matrix, kind, int(float(rate) * matrix.numel() / 8))
    if rest == "sq4":
        kind, rows, extra = faiss.ScalarQuantizer.QT_4bit, matrix, 0
    else:
        kind = getattr(faiss.ScalarQuantizer, f"QT_{rest.removeprefix('eden')}bit_eden")
        rms = matrix.square().mean(1, keepdim=True).sqrt()
        rows, extra = matrix / rms.clamp_min(torch.finfo(torch.float32).tiny), _held(rms)
    index = faiss.IndexScalarQuantizer(matrix.shape[1], kind)
    index.train(rows.numpy())
    if rest == "sq4":
        extra = 4 * index.sq.trained.size()
    codes = index.sa_encode(rows.numpy())
    decoded = torch.from_numpy(index.sa_decode(codes))
    return Decoded(decoded if rest == "sq4" else decoded * rms, codes.nbytes + extra)


@dataclasses.dataclass(frozen=True)
class VectorSetting:
    """Sub-vectors of `dim` columns, `stages` codes of `bits` for each; codebooks and rotation count as fp16."""

    kind: str
    dim: int
    stages: int
    bits: int

    def nbytes(self, rows: int, columns: int) -> int:
        """Return everything stored."""
        codes = rows * -(-columns // self.dim * self.stages * self.bits // 8)
        return codes + 2 * (self.stages << self.bits) * columns + (2 * columns**2 if self.kind == "opq" else 0)


SETTINGS_TRIED = {"pq": 3, "opq": 1, "rq": 2, "lsq": 2}
LARGE = 400_000  # elements, above which only the first setting of the slow kinds is tried
OPQ_ROUNDS, LSQ_ROUNDS = 20, 10  # of training, for time; FAISS's own numbers are 50 and 25


def _faiss_settings(kind: str, rows: int, columns: int, nbytes: int) -> list[VectorSetting]:
    """Return settings within `nbytes`, those with the most code bits an element first, then the longest sub-vectors."""
    plain = kind in ("pq", "opq")
    found = []
    for dim, stages in itertools.product((1, 2, 4, 8, 16) if plain else (4, 8, 16), (1,) if plain else (2, 3, 4)):
        fits = [setting for bits in range(1, 13) if 1 << bits <= rows and columns % dim == 0
                and (setting := VectorSetting(kind, dim, stages, bits)).nbytes(rows, columns) <= nbytes]
        found += fits[-1:]
    found.sort(key=lambda setting: (-setting.stages * setting.bits / setting.dim, -setting.dim, setting.stages))
    return found[: 1 if not plain and rows * columns > LARGE else SETTINGS_TRIED[kind]]


def _faiss_vectors(matrix: Tensor, kind: str, nbytes: int) -> Decoded:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, columns = matrix.shape
    best: tuple[float, Decoded] | None = None
    for setting in _faiss_settings(kind, rows, columns, nbytes):
        decoded = torch.from_numpy(_faiss_decoded(matrix.numpy(), setting))
        error = relative_error(matrix, decoded)
        if best is None or error < best[0]:
            detail = f"dim {setting.dim}, {setting.stages} x {setting.bits} bit"
            best = error, Decoded(decoded, setting.nbytes(rows, columns), detail)
    if best is None:
        raise CannotRunError(f"faiss {kind}: no setting stores shape {tuple(matrix.shape)} in {nbytes} bytes")
    return best[1]


def _faiss_decoded(x: Any, setting: VectorSetting) -> Any:
    import faiss
    import numpy as np

    columns, parts = x.shape[1], x.shape[1] // setting.dim
    if setting.kind == "opq":
        plain = faiss.ProductQuantizer(columns, parts, setting.bits)
        plain.cp.min_points_per_centroid = 1
        rotation = faiss.OPQMatrix(columns, parts)
        rotation.pq, rotation.niter = plain, OPQ_ROUNDS
        rotation.train(x)
        turn = faiss.vector_to_array(rotation.A).reshape(columns, columns).astype(np.float16).astype(np.float32)
        turned = _faiss_decoded(np.ascontiguousarray(x @ turn.T), dataclasses.replace(setting, kind="pq"))
        return np.ascontiguousarray(turned @ turn)
    if setting.kind == "pq":
        quantizer = faiss.ProductQuantizer(columns, parts, setting.bits)
        quantizer.cp.min_points_per_centroid = 1
    else:
        make = {"rq": faiss.ProductResidualQuantizer, "lsq": faiss.ProductLocalSearchQuantizer}[setting.kind]
        quantizer = make(columns, parts, setting.stages, setting.bits)
        for part in range(parts if setting.kind == "lsq" else 0):
            faiss.downcast_AdditiveQuantizer(quantizer.subquantizer(part)).train_iters = LSQ_ROUNDS
    quantizer.train(x)
    return quantizer.decode(quantizer.compute_codes(x))


_PEERS: Mapping[str, Callable[[Tensor, str], Decoded]] = {
    "nf4": _nf4, "hqq": _hqq, "quanto": _quanto, "torchao": _torchao, "gguf": _gguf, "faiss": _faiss}


def relative_error(matrix: Tensor, decoded: Tensor) -> float:
    """Return `‖W - Ŵ‖² / ‖W‖²`, summed in float64 by blocks of rows."""
    noise = signal = 0.0
    for start in range(0, matrix.shape[0], 256):
        rows = matrix[start : start + 256].to(torch.float64)
        noise += float((rows - decoded[start : start + 256]).square().sum())
        signal += float(rows.square().sum())
    return noise / signal


def shannon_gap(rate: float, error: float) -> float:
    """Return the dB lost to the Gaussian rate-distortion function `4**-rate`."""
    return 20.0 * math.log10(2.0) * rate + 10.0 * math.log10(error)

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

Constant tables (NF4's 16 levels, the grids of IQ types, Lloyd-Max tables) belong to the decoder and are not counted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import tersor

_MODULES = {"nf4": "bitsandbytes", "hqq": "hqq", "quanto": "optimum.quanto", "torchao": "torchao", "gguf": "libgguf",
            "faiss": "faiss"}


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A matrix after a round trip: float32 (out, in), and the bytes it took, everything stored counted."""

    matrix: Tensor
    nbytes: int


class PeerMissingError(RuntimeError):
    """The package of a peer is not installed."""


def quantize(method: str, matrix: Tensor, seed: int = 0) -> Decoded:
    """Encode and decode `matrix` (out, in), float32.

    Raises
    ------
    PeerMissingError
        If the peer's package is not installed here.
    """
    head, _, rest = method.partition(":")
    if not rest:
        encoded = tersor.compress(matrix, codec=method, seed=seed)
        return Decoded(encoded.decode(), encoded.nbytes)
    if head == "tersor":
        family, rate = rest.split("@")
        encoded = tersor.compress(matrix, rate=float(rate), codec=family, seed=seed)
        return Decoded(encoded.decode(), encoded.nbytes)
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

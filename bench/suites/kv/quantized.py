"""transformers' `QuantizedCache` by its two backends, quanto and HQQ, with the settings that it has by default."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, PretrainedConfig, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from bench.suites.kv import quanto
from bench.worker import SkipError

GROUP, RESIDUAL = 64, 128
INSTALLED = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}


def made(method: str, config: PretrainedConfig) -> QuantizedCache:
    """Return an empty cache of a method such as `quanto:4`.

    Raises
    ------
    SkipError
        If the backend's package is not installed.
    """
    backend, _, bits = method.partition(":")
    if not INSTALLED[backend]():
        raise SkipError(f"QuantizedCache's backend '{backend}' is not installed: see bench/requirements-nodeps.txt")
    if backend == "quanto":
        quanto.prepare()
    return QuantizedCache(backend, config, nbits=int(bits), axis_key=0, axis_value=0, q_group_size=GROUP,
                          residual_length=RESIDUAL)


def nbytes(cache: Cache) -> int:
    """Return the bytes of a filled cache: codes, scales, zeros, and the recent tokens that are dense."""
    found = 0
    for layer in cache.layers:
        own: Any = layer
        held = [own.keys, own.values, *_parts(own._quantized_keys), *_parts(own._quantized_values)]
        found += sum(tensor.numel() * tensor.element_size() for tensor in held)
    return found


def _parts(side: Any) -> list[Tensor]:
    """Return the tensors of one side: of HQQ codes and what they mean, of quanto a tensor of its own kind."""
    if isinstance(side, tuple):
        return [side[0], side[1]["scale"], side[1]["zero"]]
    return [side._data._data, side._scale, side._shift]

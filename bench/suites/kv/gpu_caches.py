"""Caches on a GPU, filled with random states: dense, static, quanto's, Tersor's."""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, QuantizedCache, StaticCache

from bench.suites.gpu.timing import SEED, device, relative, settle
from bench.suites.kv import quanto
from bench.worker import SetupError
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer
from tersor.hf.kv.store import SIDES, LayerState
from tersor.kv import TokenStream, matrices
from tersor.payload.blocks import Tables
from tersor.registry import parse

RESIDUAL, SINK, BLOCK, GROUP = 128, 4, 64, 64
STEPS = 24  # timed
ENCODED = 16  # blocks that are encoded; further ones are copies of their codes
TRAINED = 24  # blocks that tables of `klt` are trained on
STATE: dict[str, Any] = {}
"""The model and the tables trained for it: a worker's own."""


def config() -> LlamaConfig:
    """Return the model's shape; a tiny one in a rehearsal."""
    if device().type == "cpu":
        return LlamaConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                           intermediate_size=64, vocab_size=64, num_hidden_layers=2, max_position_embeddings=65536)
    return LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                       intermediate_size=14336, vocab_size=1024, num_hidden_layers=4, max_position_embeddings=65536,
                       rope_theta=5e5)


def states(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random keys and values (1, heads, tokens, dim), bf16, whose components decay in size."""
    made = config()
    random = torch.Generator(device()).manual_seed(seed)
    size = torch.linspace(2.0, 0.2, made.head_dim, device=device())
    shape = (1, made.num_key_value_heads, tokens, made.head_dim)
    both = [torch.randn(shape, device=device(), generator=random) * size for _ in range(2)]
    return both[0].to(torch.bfloat16), both[1].to(torch.bfloat16)


def codec_of(method: str) -> tuple[str, dict[str, Tables]]:
    """Return a method's codec string and tables by side; tables are trained on the processor, once a worker."""
    if not method.startswith("klt:"):
        return method, {}
    made = config()
    codec = parse(f"klt{round(float(method[4:]) * made.head_dim / 8)}h{made.num_key_value_heads}x{BLOCK}")
    if codec.spec() not in STATE:
        began = time.perf_counter()
        samples = states(TRAINED * BLOCK, SEED + 1000)
        STATE[codec.spec()] = {side: dict(codec.train(matrices(part.float().cpu(), BLOCK), seed=SEED))
                               for side, part in zip(SIDES, samples, strict=True)}
        print(f"    tables of {codec}: {time.perf_counter() - began:.1f} s", flush=True)
    return codec.spec(), STATE[codec.spec()]


@dataclasses.dataclass
class Filled:
    """A cache after so many tokens.

    Attributes
    ----------
    encode_ms : float
        A token, all layers: what is done now and then.
    """

    cache: Cache
    encode_ms: float = 0.0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def filled(method: str, tokens: int) -> Filled:
    """Return a cache of random states."""
    made = STATE["model"].config
    if method == "none":
        return _updated(DynamicCache(config=made), tokens)
    if method == "static":
        return _updated(StaticCache(config=made, max_cache_len=tokens + 2 * STEPS), tokens)
    if method.startswith("quanto:"):
        notes = quanto.prepare()
        cache = QuantizedCache("quanto", made, nbits=int(method[7:]), axis_key=0, axis_value=0, q_group_size=GROUP,
                               residual_length=RESIDUAL)
        begun = Clock()
        found = _updated(cache, tokens)
        first = begun.ms() / made.num_hidden_layers
        layer: Any = cache.layers[0]
        layer._quantize(layer._dequantize(layer._quantized_keys).contiguous(), axis=0)  # warm
        again = Clock()
        layer._quantize(layer._dequantize(layer._quantized_keys).contiguous(), axis=0)
        layer._quantize(layer._dequantize(layer._quantized_values).contiguous(), axis=0)
        notes["first_ms"] = first
        found.encode_ms = again.ms() * made.num_hidden_layers / RESIDUAL
        return dataclasses.replace(found, notes=notes)
    return _compressed(method, tokens)


class Clock:
    """Milliseconds since it was made, the device settled before and after."""

    def __init__(self) -> None:
        settle()
        self.began = time.perf_counter()

    def ms(self) -> float:
        """Return milliseconds until now."""
        settle()
        return 1e3 * (time.perf_counter() - self.began)


def _updated(cache: Cache, tokens: int) -> Filled:
    keys, values = states(tokens, SEED)
    for number in range(STATE["model"].config.num_hidden_layers):
        cache.update(keys.clone(), values.clone(), number)
    return Filled(cache)


def _compressed(method: str, tokens: int) -> Filled:
    """Encode a few blocks, and repeat their codes: what decoding costs does not depend on them."""
    made = STATE["model"].config
    spec, tables = codec_of(method)
    held = {(number, side): table for number in range(made.num_hidden_layers) for side, table in tables.items()}
    cache = CompressedCache(made, spec, spec, residual=RESIDUAL, sink=SINK, block=BLOCK, tables=held)
    layer: Any = cache.layers[0]
    blocks = (tokens - SINK - RESIDUAL) // BLOCK
    some = min(ENCODED, blocks)
    keys, values = states(SINK + some * BLOCK + RESIDUAL, SEED)
    layer.extend(keys, values, lazy=True)
    assert layer.streams[0].tokens == some * BLOCK
    check = _against_processor(layer, keys, values)
    twin = copy.deepcopy(layer)
    twin.extend(keys[:, :, : 4 * BLOCK], values[:, :, : 4 * BLOCK], lazy=True)
    clock = Clock()
    twin.extend(keys[:, :, : 4 * BLOCK], values[:, :, : 4 * BLOCK], lazy=True)
    share = clock.ms() / (4 * BLOCK) * made.num_hidden_layers
    state = layer.state()
    for number in range(made.num_hidden_layers):
        cache.layers[number] = CompressedCacheLayer.restore(_grown(state, blocks, some), cache.window,
                                                            f"layer {number}")
    return Filled(cache, share, check)


def _grown(state: LayerState, blocks: int, some: int) -> LayerState:
    """Return a layer's state with its encoded blocks repeated, in memory of its own; tables stay shared."""
    tensors, meta = dict(state.tensors), {name: dict(value) for name, value in state.meta.items()}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"stream/(key|value)/(blocks|tables)/.*", name)
        if found is None:
            tensors[name] = tensor.clone()
            if re.fullmatch(r"stream/(key|value)/block\d+/.*", name):
                raise SetupError("payloads of this codec do not lie side by side; it is too slow to be timed")
        elif found[2] == "blocks":
            index = torch.arange(blocks, device=tensor.device) % some
            tensors[name] = tensor.index_select(0, index)
    for side in SIDES:
        meta[side]["blocks"] = blocks
    return LayerState(tensors, meta)


def _against_processor(layer: Any, keys: Tensor, values: Tensor) -> dict[str, Any]:
    """Return how far streams decode from what the processor makes of the same bytes, and from the states."""
    found: dict[str, Any] = {}
    inside = slice(SINK, SINK + layer.streams[0].tokens)
    for side, stream, given in zip(SIDES, layer.streams, (keys, values), strict=True):
        tensors, meta = stream.state()
        twin = TokenStream.from_state({name: t.cpu() for name, t in tensors.items()}, meta)
        here = stream.decode()
        found[f"{side}_decode_error"] = relative(here.cpu(), twin.decode())
        found[f"{side}_error"] = relative(here, given[:, :, inside])
    return found

"""Queries, keys and values of SmolLM2-135M, and what errors do to the outputs of its attention."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench import evaluation, models
from bench.places import CALIBRATION as CALIBRATION_TEXT
from bench.places import held_out, kept
from bench.suites.kv.sensitivity import Sensitivity, before_rotation, sensitivity
from tersor.codecs import Klt
from tersor.contract.codec import Codec
from tersor.kv import TokenStream, matrices
from tersor.payload.blocks import Tables
from tersor.registry import parse

LAYERS = (0, 5, 11, 17, 23, 29)
HEADS, QUERIES, DIM, WINDOW, BLOCK, SINK, RECENT = 3, 9, 64, 2048, 128, 4, 128
ENCODED = slice(SINK, SINK + (WINDOW - SINK - RECENT) // BLOCK * BLOCK)
TEXTS, CALIBRATION, OFFSET = ("fiction", "technical"), 4, 500_000
ASKED = torch.arange(256, WINDOW, 16)  # queries measured
THETA = 100_000.0
SEED = 0


def states() -> dict[str, dict[str, Tensor]]:
    """Return queries, keys (before and after rotation) and values by layer, of calibration and held-out windows."""
    file = kept("kv") / "smollm2.safetensors"
    if not file.is_file():
        save_file(_run(), file)
    loaded = load_file(file)
    return {part: {name.removeprefix(f"{part}/"): t for name, t in loaded.items() if name.startswith(part)}
            for part in ("calibration", "held")}


def _run() -> dict[str, Tensor]:
    path = models.smollm2_gguf()
    model, tokenizer = evaluation.load_model(path), evaluation.load_tokenizer(path)
    seen: dict[str, list[Tensor]] = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        if module.layer_idx in LAYERS:
            for name, tensor in (("queries", query), ("keys", key), ("values", value)):
                seen.setdefault(f"{module.layer_idx}/{name}", []).append(tensor.clone())
        return sdpa_attention_forward(module, query, key, value, mask, **rest)

    AttentionInterface.register("record", attention)
    model.set_attn_implementation("record")
    for layer in LAYERS:
        model.model.layers[layer].self_attn.k_proj.register_forward_hook(
            lambda _m, _i, output, layer=layer: seen.setdefault(f"{layer}/unrotated", []).append(
                output.unflatten(-1, (HEADS, DIM)).transpose(1, 2).clone()))
    calibration = CALIBRATION_TEXT.read_text()
    texts = {"calibration": [calibration[k * OFFSET : k * OFFSET + 20_000] for k in range(CALIBRATION)],
             "held": [held_out(name)[:20_000] for name in TEXTS]}
    found = {}
    for part, windows in texts.items():
        seen.clear()
        for text in windows:
            ids = tokenizer(text, verbose=False)["input_ids"][:WINDOW]
            with torch.no_grad():
                model.model(torch.tensor([ids]))
        found |= {f"{part}/{name}": torch.cat(parts) for name, parts in seen.items()}
    return found


@functools.cache
def rotation() -> tuple[Tensor, Tensor]:
    """Return cosines and sines of every position, (WINDOW, DIM)."""
    angles = torch.arange(WINDOW, dtype=torch.float32)[:, None] / THETA ** (torch.arange(0, DIM, 2) / DIM)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(keys: Tensor, places: slice) -> Tensor:
    """Return keys (..., tokens, dim) rotated by position."""
    cosines, sines = (t[places] for t in rotation())
    first, second = keys.chunk(2, -1)
    return keys * cosines + torch.cat([-second, first], -1) * sines


class Layer:
    """One layer's states, its sensitivity, and what errors do to its outputs."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]], number: int) -> None:
        self.calibration, self.held = ({name.removeprefix(f"{number}/"): t for name, t in parts[part].items()
                                        if name.startswith(f"{number}/")} for part in ("calibration", "held"))
        assert float((rotate(self.held["unrotated"], slice(0, WINDOW)) - self.held["keys"]).norm()) < 1e-3 * float(
            self.held["keys"].norm())
        self.felt: Sensitivity = sensitivity(*(self.calibration[n] for n in ("queries", "keys", "values")), sink=SINK)
        self.before = before_rotation(self.felt.metric, *(t[::16] for t in rotation()))

    def tables(self, codec: Codec, name: str, trained: str) -> Tables:
        """Return the codec's tables for `keys`, `unrotated` or `values`, trained on the calibration windows."""
        samples = matrices(self.calibration[name][:, :, ENCODED], BLOCK)
        if trained == "plain" or not isinstance(codec, Klt):
            return codec.train(samples, seed=SEED)
        weights = self.felt.values if name == "values" else self.felt.keys
        flat = [part.flatten() for part in matrices(weights[:, :, ENCODED].unsqueeze(-1), BLOCK)]
        metric = {"keys": self.felt.metric, "unrotated": self.before, "values": None}[name]
        return codec.fit(samples, metric=metric, weights=flat, seed=SEED)

    def coded(self, text: str, name: str, trained: str) -> tuple[Tensor, TokenStream, float]:
        """Return states with the encoded part decoded (keys rotated), the stream, and seconds of encoding."""
        codec = parse(text)
        stream = TokenStream(codec, BLOCK, tables=self.tables(codec, name, trained), seed=SEED)
        start = time.perf_counter()
        stream.append(self.held[name][:, :, ENCODED])
        seconds = time.perf_counter() - start
        decoded = stream.decode()
        whole = self.held["keys" if name == "unrotated" else name].clone()
        whole[:, :, ENCODED] = rotate(decoded, ENCODED) if name == "unrotated" else decoded
        return whole, stream, seconds

    def outputs(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return attention's outputs for the queries measured, tokens other than sinks and recent ones as given."""
        repeat = QUERIES // HEADS
        asked = self.held["queries"][:, :, ASKED]
        exact = [self.held[name].repeat_interleave(repeat, 1) for name in ("keys", "values")]
        given = [t.repeat_interleave(repeat, 1) for t in (keys, values)]
        index, places = torch.arange(WINDOW), ASKED.unsqueeze(1)
        recent = index > places - RECENT
        scores = torch.where(recent, asked @ exact[0].mT, asked @ given[0].mT) / DIM**0.5
        weights = scores.masked_fill(index > places, -torch.inf).softmax(-1)
        return (weights * recent) @ exact[1] + (weights * ~recent) @ given[1]

"""Codecs of keys and values on SmolLM2-135M: squared error, error of attention's outputs, and time a decoded number.

Six layers. Tables are trained on four windows of calibration text; everything is measured on the first window of two
held-out texts. As in a cache, the first 4 tokens and the 128 before a query are dense, and blocks of 128 tokens are
encoded. `python bench/kv_codecs.py quality` or `speed`, one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from kv_sensitivity import Sensitivity, before_rotation, sensitivity
from tersor.codecs import Klt
from tersor.contract.codec import Codec
from tersor.errors import BudgetError
from tersor.families import FAMILIES
from tersor.families.qet import Preset
from tersor.kv import TokenStream, matrices
from tersor.payload.blocks import Tables
from tersor.registry import parse

LAYERS = (0, 5, 11, 17, 23, 29)
HEADS, QUERIES, DIM, WINDOW, BLOCK, SINK, RECENT = 3, 9, 64, 2048, 128, 4, 128
ENCODED = slice(SINK, SINK + (WINDOW - SINK - RECENT) // BLOCK * BLOCK)
TEXTS, CALIBRATION, OFFSET = ("fiction", "technical"), 4, 500_000
ASKED = torch.arange(256, WINDOW, 16)  # queries measured
THETA = 100_000.0
RATES = (1.5, 2, 3, 4)
SPEED = ("klt8h3x128", "klt12h3x128", "klt16h3x128", "klt16sh3x128", "klt24h3x128", "klt32h3x128", "rot,lm2",
         "rot,sym16", "rtn2g128o", "rtn2g64", "pq4x256t", "fp8", "bf16")
SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One method at one nominal rate: codec strings of keys and values, and how tables are trained."""

    method: str
    rate: float
    keys: str
    values: str
    trained: str = "plain"  # "attention": under the queries' metric and with the tokens' weights
    rotated: bool = True  # keys after their rotation by position

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"{self.method}@{self.rate:g}"


@dataclasses.dataclass(frozen=True)
class SpeedCase:
    """One codec at one number of tokens."""

    codec: str
    tokens: int

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"speed:{self.codec}@{self.tokens}"


def cases() -> list[Case]:
    """Return every case; rates are nominal, measured ones are in the results."""
    found = [Case("fp8", 8, "fp8", "fp8"), Case("klt, attention", 1, "klt8h3x128", "klt8h3x128", "attention")]
    for rate in RATES:
        levels = {1.5: "L3", 2: "2", 3: "3", 4: "4"}[rate]
        klt = f"klt{int(8 * rate)}h3x128"
        found += [
            Case("KIVI form", rate, f"rtn{levels}g128o", f"rtn{levels}g64"),
            Case("KIVI form, Lloyd-Max", rate, f"lm{levels}g128o", f"lm{levels}g64"),
            Case("TurboQuant form", rate, f"rot,lm{levels}", f"rot,lm{levels}"),
            Case("qet_plus", rate, f"rot,sym{int(8 * rate)}", f"rot,sym{int(8 * rate)}"),
            Case("qet, published", rate, published(rate), published(rate)),
            Case("std", rate, f"std,lm{levels}g128o", f"std,lm{levels}"),
            Case("klt", rate, klt, klt),
            Case("klt, attention", rate, klt, klt, "attention"),
            Case("klt, attention, sized", rate, klt.replace("h", "sh"), klt.replace("h", "sh"), "attention"),
            Case("klt, attention, before rotation", rate, klt, klt, "attention", rotated=False),
        ]
        pq = {1.5: "pq4x64t", 2: "pq4x256t", 3: "pq2x64t", 4: "pq2x256t"}[rate]
        found += [Case("pq, shared", rate, pq, pq), Case("opq, shared", rate, f"opqt,{pq}", f"opqt,{pq}")]
        if rate >= 2:
            low = f"sum(lr4(lm4o;lm4o);rot,lm{levels})"
            found.append(Case("low rank + scalar", rate, low, low))
    return found


@functools.cache
def published(rate: float) -> str:
    """Return QET as published, fitted to one block: the structure and codebook size of least error on normal noise."""
    shape = (HEADS * BLOCK, DIM)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    best: tuple[float, Codec] | None = None
    for dim in (1, 2, 4, 8):
        for layers in (1, 2, 3):
            for made in (Preset("qet_vanilla", (layers,), (1.0,), "b10", dim=dim),
                         Preset("qet", (layers, 0), (0.7, 0.3), "b10", dim=dim)):
                try:
                    codec = made.fit(shape, int((rate + 0.25) * shape[0] * DIM / 8))
                except BudgetError:
                    continue
                error = float((codec.encode(sample).decode() - sample).norm())
                if best is None or error < best[0]:
                    best = error, codec
    assert best is not None, FAMILIES
    return best[1].spec()


def folder() -> Path:
    """Return the folder of cached states."""
    found = common.ROOT / "out" / "kv"
    found.mkdir(parents=True, exist_ok=True)
    return found


def states() -> dict[str, dict[str, Tensor]]:
    """Return queries, keys (before and after rotation) and values by layer, of calibration and held-out windows."""
    from safetensors.torch import load_file, save_file

    file = folder() / "smollm2.safetensors"
    if not file.is_file():
        save_file(_run(), file)
    loaded = load_file(file)
    return {part: {name.removeprefix(f"{part}/"): t for name, t in loaded.items() if name.startswith(part)}
            for part in ("calibration", "held")}


def _run() -> dict[str, Tensor]:
    from transformers import AttentionInterface, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    import evaluate_dense
    import models

    path = models.smollm2_gguf()
    model = evaluate_dense.load_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
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
    calibration = (common.ROOT.parent / "shared" / "data" / "text" / "calibration.txt").read_text()
    texts = {"calibration": [calibration[k * OFFSET : k * OFFSET + 20_000] for k in range(CALIBRATION)],
             "held": [(common.TEXTS / f"{name}.txt").read_text()[:20_000] for name in TEXTS]}
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


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the squared error over the power."""
    return float((found - exact).square().sum() / exact.square().sum())


def run_quality(chosen: str) -> None:
    parts = states()
    layers = [Layer(parts, number) for number in LAYERS]
    for case in cases():
        if chosen not in case.key:
            continue
        rows = []
        for layer in layers:
            exact = layer.outputs(layer.held["keys"], layer.held["values"])
            keys, kstream, kseconds = layer.coded(case.keys, "keys" if case.rotated else "unrotated", case.trained)
            values, vstream, vseconds = layer.coded(case.values, "values", case.trained)
            numbers = {"mse_keys": relative(keys[:, :, ENCODED], layer.held["keys"][:, :, ENCODED]),
                       "mse_values": relative(values[:, :, ENCODED], layer.held["values"][:, :, ENCODED]),
                       "output_keys": relative(layer.outputs(keys, layer.held["values"]), exact),
                       "output_values": relative(layer.outputs(layer.held["keys"], values), exact),
                       "output": relative(layer.outputs(keys, values), exact)}
            rows.append((numbers, kstream, vstream, kseconds + vseconds))
        elements = rows[0][1].batch * HEADS * rows[0][1].tokens * DIM
        numbers = {name: math.exp(sum(math.log(row[0][name]) for row in rows) / len(rows)) for name in rows[0][0]}
        numbers |= {"bits_keys": 8 * rows[0][1].nbytes / elements, "bits_values": 8 * rows[0][2].nbytes / elements,
                    "table_bytes_a_layer": rows[0][1].table_nbytes + rows[0][2].table_nbytes,
                    "encode_ns_a_number": sum(row[3] for row in rows) / (2 * elements * len(rows)) * 1e9,
                    "layers": {str(n): row[0] for n, row in zip(LAYERS, rows, strict=True)}}
        common.record("kv_codecs", case, seed=SEED, nbytes=sum(row[1].nbytes + row[2].nbytes for row in rows),
                      numbers=numbers)
        print(f"{case.key:36} bits {numbers['bits_keys']:.3f} {numbers['bits_values']:.3f}  "
              f"mse {numbers['mse_keys']:.4f} {numbers['mse_values']:.4f}  output K {numbers['output_keys']:.6f} "
              f"V {numbers['output_values']:.6f} both {numbers['output']:.6f}  "
              f"enc {numbers['encode_ns_a_number']:.0f} ns", flush=True)


def best_of(operation: Callable[[], Any], repeats: int = 9) -> float:
    """Return the least seconds of a few calls after two."""
    operation()
    operation()
    found = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        operation()
        found = min(found, time.perf_counter() - start)
    return found


def run_speed(chosen: str) -> None:
    generator = torch.Generator().manual_seed(SEED)
    every = states()["calibration"]["17/keys"].transpose(0, 1).flatten(1, 2).unsqueeze(0)
    for tokens in (4096, 8192):
        keys = every[:, :, :tokens].contiguous()
        queries = torch.randn(1, HEADS, QUERIES // HEADS, DIM, generator=generator)
        weights = torch.rand(1, HEADS, QUERIES // HEADS, tokens, generator=generator)
        for text in SPEED:
            case = SpeedCase(text, tokens)
            if chosen not in case.key:
                continue
            codec = parse(text)
            stream = TokenStream(codec, BLOCK, tables=codec.train(matrices(keys[:, :, :2048], BLOCK)))
            stream.append(keys)
            scale = 1e9 / keys.numel()
            numbers = {
                "scores_ns": best_of(lambda: stream.scores(queries)) * scale,  # noqa: B023 - called at once
                "mix_ns": best_of(lambda: stream.mix(weights)) * scale,  # noqa: B023
                "decode_ns": best_of(stream.decode, 3) * scale,
                "dense_scores_ns": best_of(lambda: queries @ keys.mT) * scale,  # noqa: B023
                "dense_mix_ns": best_of(lambda: weights @ keys) * scale,  # noqa: B023
            }
            common.record("kv_codecs", case, seed=SEED, nbytes=stream.nbytes, numbers=numbers)
            print(f"{case.key:28} " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--only", default="", help="part of a case's key")
    arguments = parser.parse_args()
    with common.threads(1):
        (run_quality if arguments.what == "quality" else run_speed)(arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Logits of a small trained model on a GPU against the processor's: one compressed store, one text, two devices.

The folder dev/fable-22m holds fable-22m, compressed by one codec (11 MB at 4 bits travel; the model itself does not).
Stores of other codecs are made of what it decodes to. The processor computes in float32, in plain torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.places import ROOT, held_out
from bench.suites.gpu import payload
from bench.suites.gpu.cases import Logits
from bench.suites.gpu.model import STORES
from bench.suites.gpu.timing import PlainTorch, device, relative, settle
from bench.worker import Emit, SetupError, listed
from tersor import store
from tersor.hf.models import quantizer  # noqa: F401 - registers the quantizer
from tersor.hf.models.matrices import quiet
from tersor.registry import parse

FOLDER = ROOT / "dev" / "fable-22m"
SWEEPS = 20  # of two-basis codes: how good they are is of no matter here
HALF = 2.0**-11  # unit roundoff of float16
ROUNDINGS = 21  # of a layer, that a number meets in float16: see `bound`


def setup() -> None:
    """Prepare nothing."""


def bound(dtype: str, layers: int) -> float:
    """Return the relative error that float16 accuracy allows.

    With activations in float32: one rounding of the logits to float16. With activations in float16 a number on its way
    through a layer is rounded about 21 times: two norms (2 each), the rotation and the product before and after
    attention and twice in the MLP (2 each), the rotary embedding (2), scores, weights and their sum (3), activation
    and gate (2), two additions (2). Independent roundings add in squares, and norms keep relative errors what they are.
    """
    return HALF if dtype == "float32" else HALF * math.sqrt(ROUNDINGS * layers + 3)


def written(text: str, numbers: dict[str, Any]) -> Path:
    """Return the store of a codec: the folder, or one made of what that decodes to."""
    if not (FOLDER / "config.json").is_file():
        raise SetupError(f"{FOLDER}: no compressed model; make it: tersor compress ../shared/data/models/fable-22m "
                         f"{FOLDER} --codec rot,lm4 --rate 4.05 --uncalibrated --evaluation-tokens 0")
    origin, codec = store.read(FOLDER), parse(text)
    if {origin.matrix(name).codec for name in origin.matrix_names()} == {codec}:
        return FOLDER
    folder = STORES / f"logits-{''.join(c if c.isalnum() else '-' for c in text)}"
    if folder.exists():
        return folder
    began, options = time.perf_counter(), {"sweeps": SWEEPS} if "two" in text else {}

    def coded(entry: store.Entry) -> Mapping[str, Tensor]:
        if entry.codec is None:
            return {"": origin.plain(entry.name)}
        matrix = origin.matrix(entry.name).decode().to(device())
        return {name: tensor.cpu() for name, tensor in codec.encode(matrix, options=options).tensors.items()}

    entries = [store.Entry(name, entry.shape, entry.dtype, None if entry.codec is None else codec)
              for name, entry in origin.entries.items()]
    files = {file.name: file for file in FOLDER.glob("*.json") if file.name not in (store.MANIFEST, store.INDEX)}
    store.write(folder, entries, coded, kind="model", files=files)
    numbers["encode_s"] = time.perf_counter() - began
    return folder


def text_ids(tokens: int) -> Tensor:
    """Return the first tokens of held-out fiction, (1, tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = held_out("fiction")[: 16 * tokens]
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens])[None]


def logits(folder: Path, where: torch.device, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """Return the logits of a store on a device, float64 (tokens, vocabulary) on the processor."""
    placed: dict[str, Any] = {"": 0 if where.type == "cuda" else "cpu"}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=placed).eval()
    found = model(input_ids=ids.to(where), use_cache=False).logits[0]
    settle()
    return found.to("cpu", torch.float64)


def run(case: Logits, emit: Emit) -> None:
    """Compute the logits on both devices, compare, and also say how far plain torch is on the same GPU."""
    numbers: dict[str, Any] = {}
    folder = written(case.codec, numbers)
    kind, ids = getattr(torch, case.dtype), text_ids(case.tokens)
    wanted = logits(folder, torch.device("cpu"), torch.float32, ids)
    with PlainTorch() as path:
        found = logits(folder, device(), kind, ids)
    with payload.reference():
        plain = logits(folder, device(), kind, ids)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    best = wanted.topk(2).values
    numbers |= {"device": device().type, "tokens": ids.shape[1], **path.numbers(),
                "error": relative(found, wanted), "error_plain": relative(plain, wanted),
                "error_kernels": relative(found, plain), "most": float((found - wanted).abs().max()),
                "largest": float(wanted.abs().max()), "margin": float((best[:, 0] - best[:, 1]).median()),
                "top1": float((found.argmax(-1) == wanted.argmax(-1)).to(torch.float64).mean()),
                "bound": bound(case.dtype, layers)}
    numbers["red"] = not numbers["error"] <= numbers["bound"]
    emit(case.key, listed(case), store.stored_nbytes(folder), numbers)

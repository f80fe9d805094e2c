"""Tokens a second of an 8B-shaped Llama of random weights, batch 1: Tersor's stores, bf16, int4, NF4.

Every linear, the head included, is compressed; Tersor also compresses the embedding, peers leave it in bf16. Tersor's
model comes through `from_pretrained` from a store of random payloads. A decoding step (`decoder.py`) is one CUDA graph
over a static cache: token in, greedy token out; of transformers' kernels, or of what `torch.compile` makes of them.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.suite import Result
from bench.suites.gpu import payload
from bench.suites.gpu.cases import Model
from bench.suites.gpu.decoder import COMPILED, MODES, Decoder, compiler_options
from bench.suites.gpu.payload import PEERS, Payloads
from bench.suites.gpu.timing import SEED, PlainTorch, device, relative, settle
from bench.worker import Emit, SkipError, listed
from tersor import store
from tersor.compiling import backend
from tersor.contract.codec import Codec, Encoded
from tersor.hf.models import quantizer  # noqa: F401 - registers the quantizer
from tersor.hf.models.matrices import empty_model, quiet, walk
from tersor.nn import CompressedEmbedding, CompressedLinear
from tersor.payload.blocks import Shape
from tersor.registry import parse

PROMPT, NEW = 16, 128  # tokens
ROUNDS = 5  # of NEW tokens, timed; the median counts
TIMED_SECONDS = 2.0  # a round, at most: fewer tokens where a step is slow
LOGITS_TOLERANCE = 0.1  # kernels against plain torch, both on bf16 activations, after all layers
STORES = Path(tempfile.gettempdir()) / "tersor-gpu"


def setup() -> None:
    """Prepare nothing."""


def retry(case: Model, problem: str) -> Model | None:
    """Return a failed case without its first mode, or in the next one where the capture was at fault."""
    if len(case.modes) > 1:
        return dataclasses.replace(case, modes=case.modes[1:])
    later = MODES[MODES.index(case.modes[0]) + 1 :]
    return dataclasses.replace(case, modes=later[:1]) if later and "captur" in problem else None


class Ratios:
    """Adds to every line its ratio to bf16 in the same run and mode."""

    def __init__(self) -> None:
        self.bf16: dict[tuple[int, str], float] = {}

    def finish(self, result: Result) -> None:
        """Add the ratio."""
        case, numbers = result.case, result.numbers
        if "tokens_s" not in numbers:
            return
        at = case["layers"], numbers["mode"]
        if case["codec"] == "bf16":
            self.bf16[at] = numbers["tokens_s"]
        if at in self.bf16:
            numbers["x_bf16"] = float(f"{numbers['tokens_s'] / self.bf16[at]:.4g}")


def config(layers: int) -> LlamaConfig:
    """Return Llama 3.1 8B's shape; a tiny one in a rehearsal."""
    size: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                            "intermediate_size": 14336, "vocab_size": 128256}
    if device().type == "cpu":
        size = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "intermediate_size": 128, "vocab_size": 256}
        layers = min(layers, 2)
    return LlamaConfig(**size, num_hidden_layers=layers, max_position_embeddings=131072, rope_theta=5e5,
                       tie_word_embeddings=False, dtype="bfloat16", bos_token_id=None, eos_token_id=None,
                       architectures=["LlamaForCausalLM"])


def entries(made: LlamaConfig, codec: Codec) -> list[store.Entry]:
    """Return what a store of the model holds: every matrix by one codec, norms as they are."""
    layout = walk(empty_model(made))
    found = [store.Entry(name, one.shape, "bfloat16", codec) for name, one in layout.matrices.items()]
    return found + [store.Entry(name, tuple(size), "bfloat16") for name, size in layout.plain.items()]


def companions(made: LlamaConfig) -> dict[str, bytes | Path]:
    """Return config.json as compressed models have it."""
    fields = made.to_dict()
    fields["quantization_config"] = {"quant_method": "tersor", "format_version": store.FORMAT_VERSION}
    return {"config.json": json.dumps(fields, default=str).encode()}


def place(text: str, layers: int) -> Path:
    """Return the folder of a codec's store."""
    return STORES / f"{''.join(c if c.isalnum() else '-' for c in text)}-{layers}"


def written(text: str, layers: int, numbers: dict[str, Any]) -> Path:
    """Return the folder of a store of random payloads; written once, and kept for a second try."""
    made, folder = config(layers), place(text, layers)
    if folder.exists():
        return folder
    began, sources = time.perf_counter(), dict[Shape, Payloads]()

    def drawn(entry: store.Entry) -> Mapping[str, Tensor]:
        if entry.codec is None:
            return {"": torch.ones(entry.shape, dtype=torch.bfloat16)}
        shape = entry.shape[0], entry.shape[1]
        source = sources.setdefault(shape, Payloads(entry.codec, shape))
        return {name: tensor.cpu() for name, tensor in source.draw().tensors.items()}

    store.write(folder, entries(made, parse(text)), drawn, kind="model", files=companions(made))
    numbers["write_s"] = time.perf_counter() - began
    print(f"    store written: {store.stored_nbytes(folder) / 1e9:.2f} GB in {numbers['write_s']:.1f} s", flush=True)
    return folder


def loaded(folder: Path, numbers: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    """Return the model of a store, on the device; verification is timed once more, alone."""
    began = time.perf_counter()
    store.read(folder).verify()
    numbers["verify_s"] = time.perf_counter() - began
    began = time.perf_counter()
    where: dict[str, Any] = {"": 0 if device().type == "cuda" else "cpu"}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=where,
                                                     attn_implementation=attention).eval()
    settle()
    numbers["load_s"] = time.perf_counter() - began
    print(f"    from_pretrained: {numbers['load_s']:.1f} s, of which to verify {numbers['verify_s']:.1f} s", flush=True)
    _check_loaded(model, folder)
    return model


def _check_loaded(model: nn.Module, folder: Path) -> None:
    """Raise unless the buffers are on the device and bit for bit those of the store, in three places."""
    opened = store.read(folder)
    kinds = [module for module in model.modules() if isinstance(module, (CompressedLinear, CompressedEmbedding))]
    if len(kinds) != len(opened.matrix_names()):
        raise RuntimeError(f"{len(kinds)} compressed modules for {len(opened.matrix_names())} matrices")
    names = opened.matrix_names()
    for name in {names[0], names[len(names) // 2], names[-1]}:
        held: Encoded = model.get_submodule(name.removesuffix(".weight"))._payload.encoded().check(name)
        for key, tensor in opened.matrix(name).tensors.items():
            if held.tensors[key].device.type != device().type or not torch.equal(held.tensors[key].cpu(), tensor):
                raise RuntimeError(f"{name}/{key}: not what the store holds, or not on the GPU")


def dense(layers: int, attention: str = "sdpa") -> nn.Module:
    """Return the model with random bf16 weights."""
    torch.manual_seed(SEED)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config(layers), dtype=torch.bfloat16,
                                                attn_implementation=attention).eval()


class PeerLinear(nn.Module):
    """A linear layer that a peer computes."""

    def __init__(self, apply: Callable[[Tensor], Tensor], shape: Shape, nbytes: int) -> None:
        super().__init__()
        self._apply_to, self._out, self.nbytes = apply, shape[0], nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Return (*batch, out)."""
        return self._apply_to(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self._out)


def peer(model: nn.Module, kind: str) -> nn.Module:
    """Put a peer's linear layers into a dense model, one after another; NF4 encodes the weights, int4 draws codes."""
    random = payload.generator()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            shape = module.weight.shape[0], module.weight.shape[1]
            one = payload.nf4(module.weight.detach()) if kind == "nf4" else payload.int4(shape, random)
            model.set_submodule(name, PeerLinear(one.apply, shape, one.nbytes))  # what only `one.rows` holds is dropped
    return model


def run(case: Model, emit: Emit) -> None:
    """Make the model, check it, then time it in every mode."""
    text, layers, attention = case.codec, case.layers, case.attention
    options = compiler_options(tuned=case.tuned, pdl=case.pdl)
    if text in ("int4", "nf4") and device().type == "cpu":
        raise SkipError(f"{text} runs on a GPU only")
    _tidy()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _allocated()
    shared: dict[str, Any] = {}
    if text in PEERS:
        model = dense(layers, attention)
        model = model if text == "bf16" else peer(model, text)
    else:
        model = loaded(written(text, layers, shared), shared, attention)
    _tidy()
    shared["resident"], shared["stored"] = _allocated() - before, _stored(model)
    decoder = Decoder(model, case.span, backend="inductor" if text in PEERS else backend, options=options)
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=payload.generator(),
                           device=device())
    shared["logits_error"] = 0.0 if text in PEERS else _against_reference(decoder, prompt)
    decoder.prefill(prompt)
    with PlainTorch() as path:
        eager = _steps(decoder, decoder.whole, 4)
    shared.update(path.numbers())
    done, left = set[str](), list(case.modes)
    while left:
        numbers = {**shared, **decoder.prepare(left.pop(0))}
        if "not_compiled" in numbers:
            shared["not_compiled"] = numbers["not_compiled"]
        if numbers["mode"] not in done:
            _measure(case, emit, decoder, prompt, eager, numbers)
        done.add(numbers["mode"])
    del decoder, model
    shutil.rmtree(place(text, layers), ignore_errors=True)  # a machine's disk need not hold them all


def _measure(case: Model, emit: Emit, decoder: Decoder, prompt: Tensor, eager: Sequence[Tensor],
             numbers: dict[str, Any]) -> None:
    """Check a prepared step against the logits of plain ones, time it, and emit its line."""
    decoder.prefill(prompt)
    found = _steps(decoder, decoder.step, len(eager))
    numbers["graph_error"] = max(relative(one, other) for one, other in zip(found, eager, strict=True))
    numbers["red"] = not max(numbers["logits_error"], numbers["graph_error"]) <= LOGITS_TOLERANCE
    if not numbers["red"]:
        numbers.update(_timed(decoder, prompt))
        numbers["us_prefill"] = _prefill(decoder, prompt)
    numbers["peak"] = torch.cuda.max_memory_allocated() if device().type == "cuda" else 0
    mode = numbers["mode"]
    emit(f"{case.key}|{mode}" if mode == COMPILED else case.key, listed(case, mode=mode), numbers["stored"], numbers)


def _tidy() -> None:
    """Free what nothing holds."""
    gc.collect()
    settle()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if device().type == "cuda" else 0


def _stored(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, and of a peer's layers."""
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(held.values()) + sum(m.nbytes for m in model.modules() if isinstance(m, PeerLinear))


def _against_reference(decoder: Decoder, prompt: Tensor) -> float:
    """Return how far the prompt's last logits are from those with plain torch in the place of kernels."""
    decoder.prefill(prompt)
    found = decoder.logits.clone()
    with payload.reference():
        decoder.prefill(prompt)
    print(f"    logits: standard deviation {float(found.std()):.3g}", flush=True)
    return relative(found, decoder.logits)


def _steps(decoder: Decoder, step: Callable[[], None], count: int) -> list[Tensor]:
    """Return the logits of some steps; tokens are forced to be the same ones every time."""
    found = []
    for number in range(count):
        decoder.token.fill_(number + 1)
        step()
        found.append(decoder.logits.clone())
    return found


def _timed(decoder: Decoder, prompt: Tensor) -> dict[str, Any]:
    """Return tokens a second of NEW tokens after the prompt, median of some rounds."""
    decoder.prefill(prompt)
    settle()
    began = time.perf_counter()
    for _ in range(2):
        decoder.step()
    settle()
    step = (time.perf_counter() - began) / 2
    new = max(2, min(NEW, int(TIMED_SECONDS / step)))
    rates, rounds = [], ROUNDS if step * new < 2 * TIMED_SECONDS else 1
    for _ in range(rounds):
        decoder.prefill(prompt)
        settle()
        began = time.perf_counter()
        for _ in range(new):
            decoder.step()
        settle()
        rates.append(new / (time.perf_counter() - began))
    rates.sort()
    if not math.isfinite(float(decoder.logits.abs().max())):
        raise RuntimeError("logits are not finite")
    return {"tokens_s": rates[rounds // 2], "tokens_s_least": rates[0], "tokens_s_most": rates[-1], "new": new,
            "ms_token": 1e3 / rates[rounds // 2]}


def _prefill(decoder: Decoder, prompt: Tensor) -> float:
    """Return microseconds of reading the prompt, launched one by one."""
    times = []
    for _ in range(5):
        settle()
        began = time.perf_counter()
        decoder.prefill(prompt)
        settle()
        times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[2]

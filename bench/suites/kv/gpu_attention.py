"""Attention of one decoded token over a cache on a GPU, alone: dense beside codes, by context and sequences.

Shapes are an 8B Llama's: 32 query heads, 8 of keys and values, dimension 128, bf16. Payloads are random bytes, several
caches in turn, so that none stays in the device's own cache. Tables of `klt` are trained on random states whose
components decay in size, so that bytes have words of many sizes. Calls are captured in a CUDA graph: what is timed are
the kernels. Dense is the fastest of torch's attentions, of which some take the queries that share a head as one block.
Beside them stands a step of transformers' `QuantizedCache`, which decodes all tokens and then attends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.gpu.timing import SEED, PlainTorch, device, relative, settle, time_calls
from bench.suites.kv import quantized
from bench.suites.kv.gpu_cases import QUANTIZED, Attending
from bench.worker import SkipError
from tersor.contract.codec import Codec, Encoded
from tersor.kv import matrices
from tersor.kv.coded import Form
from tersor.kv.pages import Pages
from tersor.ops.kv_attention import (
    Book,
    Closed,
    Held,
    How,
    Lying,
    Octets,
    Side,
    Spelled,
    kv_attention,
    lie_as_octets,
    lie_as_signs,
    reference,
)
from tersor.payload.blocks import Tables
from tersor.registry import parse

HEADS, GROUP, DIM, BLOCK, PAGE, SINK, RECENT = 8, 4, 128, 64, 16, 4, 160
PENDING = 64  # tokens that `QuantizedCache` has not quantized yet: half of what it lets grow
SPREAD = 2e8  # bytes of all caches in turn: several times a device's own cache
MOST = 24  # caches in turn
TRAINED = 24  # blocks that tables of `klt` are trained on
DECADES = 1.0  # that the components of its states decay
TOLERANCE = 0.01  # against float64: half precision in scores and weights, bf16 in the result
CHECKED = 8192  # tokens up to which results are compared
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return normal numbers, bf16."""
    return torch.randn(shape, device=device(), generator=generator).to(torch.bfloat16)


def side(text: str, batch: int, tokens: int, generator: torch.Generator, *, across: bool) -> Side:
    """Return closed tokens of random codes; signs lie as kernels meet them, of values `across`."""
    codec, unit = parse(text), (HEADS * BLOCK, DIM)
    form = Form.of(codec, unit, {}, device())
    assert form is not None
    specs = {name: spec for name, spec in codec.layout(unit).items() if not spec.shared}
    pages, blocks, coded = Pages(specs, batch, PAGE, device()), tokens // BLOCK, form.coded
    for first in range(0, blocks, PAGE):
        count = min(PAGE, blocks - first)
        codes = torch.randint(0, 256, (count, batch, *specs[coded.codes].stored_shape), dtype=torch.uint8,
                              device=device(), generator=generator)
        shape = (count, batch, *specs[coded.scales].stored_shape)
        scales = (0.5 + torch.rand(shape, device=device(), generator=generator)).to(torch.bfloat16)
        if coded.bits == 8:
            codes &= 0x77  # NaN are none
        pages.append({coded.codes: codes, coded.scales: scales}, count)
    way: Lying | Octets | None = None
    if lie_as_octets(form.levels, form.levels, DIM, BLOCK):
        way = Octets(HEADS, BLOCK, DIM, form.levels.bits, across)
    elif form.levels.lines is not None and lie_as_signs(form.levels, form.levels, BLOCK, batch * HEADS * tokens):
        way = Lying(HEADS, BLOCK, form.levels.lines.shape[1], across)
    return Side(form.levels, pages.buffers(), pages.slots(), pages.addresses(), pages.starts[coded.codes],
                pages.starts[coded.scales], way, pages.tickets(HEADS))


@functools.cache
def trained(codec: Codec) -> Tables:
    """Return tables of `klt`, trained on the processor on states of components that decay in size."""
    draw = torch.Generator().manual_seed(SEED)
    states = torch.randn(1, HEADS, TRAINED * BLOCK, DIM, generator=draw, dtype=torch.float32)
    tables = codec.train(matrices(states * torch.logspace(0, -DECADES, DIM), BLOCK), seed=SEED)
    return {name: table.to(device()) for name, table in tables.items()}


def spelled(text: str, batch: int, tokens: int, generator: torch.Generator, *, across: bool) -> Spelled:
    """Return closed tokens of random bytes that name words, `klt@2` at 2 bits, in the order that kernels read."""
    codec, unit = parse(f"klt{round(float(text[4:]) * DIM / 8)}h{HEADS}x{BLOCK}"), (HEADS * BLOCK, DIM)
    tables, specs = trained(codec), codec.layout(unit)
    empty = torch.zeros(specs["codes"].stored_shape, dtype=torch.uint8, device=device())
    words = codec.coordinates(Encoded(codec, unit, {"codes": empty, **tables})).words()
    assert words is not None
    book = Book.of(words, values=across)
    assert book is not None
    pages, blocks = Pages({"codes": specs["codes"]}, batch, PAGE, device()), tokens // BLOCK
    for first in range(0, blocks, PAGE):
        count = min(PAGE, blocks - first)
        pages.append({"codes": torch.randint(0, 256, (count, batch, *empty.shape), dtype=torch.uint8, device=device(),
                                             generator=generator)}, count)
    return Spelled(book, pages.buffers(), pages.slots(), pages.addresses(), pages.starts["codes"], True)


def held(case: Attending, seed: int) -> Held:
    """Return a cache of random codes."""
    generator = torch.Generator(device()).manual_seed(seed)
    tokens = (case.tokens - SINK - RECENT) // BLOCK * BLOCK
    make = spelled if case.method.startswith("klt@") else side
    keys, values = (make(case.method, case.batch, tokens, generator, across=across) for across in (False, True))
    parts = [random((case.batch, HEADS, count, DIM), generator) for count in (SINK, SINK, RECENT, RECENT)]
    return Held((parts[0], parts[1]), (parts[2], parts[3]), Closed(keys, values, tokens, BLOCK, PAGE))


def coded(case: Attending) -> tuple[int, dict[str, Any]]:
    """Return bytes of the closed tokens and what was measured of attention over codes."""
    first = held(case, 0)
    assert first.closed is not None
    parts = (first.closed.keys, first.closed.values)
    nbytes = sum(page.numel() for one in parts for page in one.pages)
    caches = [first, *(held(case, seed) for seed in range(1, max(1, min(MOST, int(SPREAD // nbytes) + 1))))]
    query = random((case.batch, HEADS * GROUP, 1, DIM), torch.Generator(device()).manual_seed(99))
    how, numbers = How(DIM**-0.5), dict[str, Any]()
    if case.tokens <= CHECKED:
        wanted = reference.attention(query, first, how, torch.float64)
        numbers["error"] = relative(kv_attention(query, first, how), wanted)
        numbers["red"] = not numbers["error"] <= TOLERANCE
    with PlainTorch() as plain:
        timing = time_calls([lambda one=one: kv_attention(query, one, how) for one in caches])
    return nbytes, {**numbers, **timing.numbers(), **plain.numbers()}


def dense(case: Attending) -> tuple[int, dict[str, Any]]:
    """Return bytes and the time of the fastest dense attention, and which it was."""
    generator = torch.Generator(device()).manual_seed(0)
    shape = (case.batch, HEADS, case.tokens, DIM)
    nbytes = 2 * 2 * case.batch * HEADS * case.tokens * DIM
    pairs = [(random(shape, generator), random(shape, generator)) for _ in range(int(2 * SPREAD // nbytes) + 1)]
    query = random((case.batch, HEADS * GROUP, 1, DIM), generator)
    best: tuple[float, str, dict[str, Any]] | None = None
    for backend in BACKENDS:
        for grouped in (False, True):
            with contextlib.suppress(RuntimeError):  # a backend that does not take this
                timing = time_calls([_dense_call(backend, query, pair, grouped) for pair in pairs])
                if best is None or timing.seconds < best[0]:
                    best = timing.seconds, f"{backend.name.lower()}{', grouped' if grouped else ''}", timing.numbers()
    settle()
    return nbytes, {} if best is None else {**best[2], "attention": best[1]}


def _dense_call(backend: Any, query: Tensor, pair: tuple[Tensor, Tensor], grouped: bool) -> Callable[[], Tensor]:
    asked = query.reshape(query.shape[0], HEADS, GROUP, DIM) if grouped else query

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(asked, *pair, enable_gqa=not grouped)

    return call


class Step:
    """A step of one layer over a `QuantizedCache`: it decodes all tokens, appends one, and attends.

    The layer is then as before, so that every call does the same. What is done once in 128 tokens, quantizing all
    anew, is timed apart.
    """

    def __init__(self, case: Attending, seed: int) -> None:
        generator = torch.Generator(device()).manual_seed(seed)
        config = LlamaConfig(hidden_size=HEADS * GROUP * DIM, num_attention_heads=HEADS * GROUP, head_dim=DIM,
                             num_key_value_heads=HEADS, num_hidden_layers=1)
        self.cache = quantized.made(case.method, config)
        self.layer: Any = self.cache.layers[0]
        self.query = random((case.batch, HEADS, GROUP, DIM), generator)  # those that share a head as one block
        for count in (case.tokens - PENDING, PENDING - 1, 1):
            self.new = tuple(random((case.batch, HEADS, count, DIM), generator) for _ in range(2))
            if count > 1:
                self.layer.update(*self.new)

    def __call__(self) -> Tensor:
        """Return what a token's queries see (batch, heads, group, dim)."""
        layer = self.layer
        recent, count = (layer.keys, layer.values), layer.cumulative_length
        keys, values = layer.update(*self.new)
        (layer.keys, layer.values), layer.cumulative_length = recent, count
        return scaled_dot_product_attention(self.query, keys, values)

    def anew(self) -> None:
        """Quantize all tokens anew."""
        layer = self.layer
        for side in (layer._quantized_keys, layer._quantized_values):
            layer._quantize(layer._dequantize(side).contiguous(), 0)


def theirs(case: Attending) -> tuple[int, dict[str, Any]]:
    """Return bytes and times of a step over transformers' `QuantizedCache`.

    Raises
    ------
    SkipError
        If its backend is not installed.
    """
    steps = [Step(case, seed) for seed in range(2)]
    red = not all(bool(step().isfinite().all()) for step in steps)
    try:
        timing = time_calls(steps)
    except RuntimeError as error:  # what cannot be captured is launched step by step
        print(f"    no graph: {str(error).splitlines()[0]}", flush=True)
        settle()
        timing = time_calls(steps, graph=False)
    anew = time_calls([steps[0].anew], graph=False)
    return quantized.nbytes(steps[0].cache), {**timing.numbers(), "red": red,
                                              "anew_us": 1e6 * anew.seconds / quantized.RESIDUAL}


def measured(case: Attending) -> tuple[int, dict[str, Any]]:
    """Return bytes and what was measured of a case."""
    if case.method in QUANTIZED:
        return theirs(case)
    return dense(case) if case.method == "none" else coded(case)


def measure(cases: Sequence[Attending], asked: Asked) -> Iterator[Outcome]:
    """Yield results as they come; dense first, for the ratios of its context."""
    del asked
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    times: dict[tuple[int, int], float] = {}
    for given in cases:
        case = given if name else dataclasses.replace(given, tokens=min(given.tokens, 512))
        try:
            nbytes, numbers = measured(case)
        except SkipError as why:
            yield Unmeasured(given.key, str(why))
            continue
        except RuntimeError as error:  # of torch, as where memory is short; what others measure stays
            yield Unmeasured(given.key, str(error).splitlines()[0], failed=True)
            continue
        if case.method == "none" and numbers:
            times[given.tokens, given.batch] = numbers["us"]
        elif (given.tokens, given.batch) in times:
            numbers["x_dense"] = float(f"{times[given.tokens, given.batch] / numbers['us']:.4g}")
        yield Result.of(given, nbytes, numbers, device=name)

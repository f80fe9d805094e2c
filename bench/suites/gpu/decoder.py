"""A decoding step of a Llama: a token in, the greedy next one out, over transformers' static cache.

Modes, each a CUDA graph where the device is a GPU:

* "graph": transformers' own code, kernel by kernel.
* "compiled": the same code through `torch.compile` (Inductor), which fuses what lies between the products. A run of
  `span` layers is compiled, once: all runs look the same to the compiler. So is looking the token up, where the
  embedding is one graph; else it stays as it is.

Attention is transformers' "sdpa" or "eager", or, of one token, "grouped": sums of products that the compiler can fuse;
or "kernel": one kernel (`attention.py`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.suites.gpu.timing import capturable, capture, device
from bench.worker import SkipError

MODES = ("compiled", "graph", "graph, embedding apart", "eager")
COMPILED = MODES[0]
ATTENTIONS = ("sdpa", "eager", "grouped", "kernel")
ROOM = 256  # tokens, of the static cache
RECOMPILATIONS = 64  # at most, of one function
BLOCKS, LEAST = (256, 128, 64), 4  # of a vocabulary, whose greatest logits are found side by side; numbers of a block
TUNED, EARLY = ("coordinate_descent_tuning", "combo_kernels"), "triton.enable_pdl"


def compiler_options(*, tuned: bool, pdl: bool) -> dict[str, Any]:
    """Return what Inductor is told: to tune kernels, products with one row too, and to join them; to launch early.

    Raises
    ------
    SkipError
        If this torch cannot.
    """
    asked = dict.fromkeys((*(TUNED if tuned else ()), *((EARLY,) if pdl else ())), True)
    missing = set(asked) - set(torch._inductor.list_options()) if asked else set()
    if missing:
        raise SkipError(f"torch {torch.__version__} knows no {sorted(missing)}")
    return asked


def grouped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            scaling: float, **others: Any) -> tuple[Tensor, None]:
    """Attend with one token, (1, heads, 1, size), to keys and values that groups of heads share, not repeated.

    Sums of products in float32; with more tokens transformers' "sdpa".
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return _sums(query, key, value, attention_mask, scaling).transpose(1, 2), None


def _sums(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return what one token attends to, (1, heads, 1, size)."""
    heads = query.unflatten(1, (key.shape[1], -1)).to(torch.float32)  # (1, groups, heads of one, 1, size)
    scores = (heads * key.unsqueeze(2)).sum(-1) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)  # (1, 1, 1, places): of all heads
    weights = scores.softmax(-1)
    found = (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(-2)
    return found.to(query.dtype).flatten(1, 2).unsqueeze(2)


@torch.library.custom_op("tersor_bench::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return what one token attends to; see `attention.attend`, which is what a GPU does."""
    return _sums(query, key, value, mask, scaling).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    del key, value, mask, scaling
    return query.new_empty(query.shape)


@attend.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    from bench.suites.gpu import attention  # needs Triton

    with torch.cuda.device(query.device):
        return attention.attend(query, key, value, mask, scaling)


def kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           scaling: float, **others: Any) -> tuple[Tensor, None]:
    """Attend as `grouped` does, in one kernel."""
    if query.shape[2] > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register("grouped", grouped)
AttentionInterface.register("kernel", kernel)


class Room(StaticLayer):
    """A layer's keys and values, written where the decoder is: no counter of its own, none to keep up to date.

    Attributes
    ----------
    place : Tensor
        The decoder's, int64 (1, 1): where the token stands that is read; 0 where several are.
    """

    def __init__(self, places: int, place: Tensor) -> None:
        super().__init__(places)
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the tensors, as transformers does, but not marked as of fixed address: that sets layers apart."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states.new_zeros(*states.shape[:2], self.max_cache_len, states.shape[3])
                                  for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of the first tokens, or of the one at `place`; return all there is room for."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            if tokens > 1:
                held[:, :, :tokens] = states
            else:
                held.index_copy_(2, self.place[0], states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def get_seq_length(self) -> int:
        """Return how many tokens came before the one that is read; waits for the device."""
        return int(self.place)


def greatest(logits: Tensor) -> Tensor:
    """Return the index of the greatest of (1, n) logits, of the first where there are several, (1, 1).

    As `argmax` does it, but by blocks first: a compiler then finds those of the blocks side by side.
    """
    count = logits.shape[1]
    blocks = next((some for some in BLOCKS if count % some == 0 and count // some >= LEAST), 0)
    if not blocks:
        return logits.argmax(-1, keepdim=True)
    size = count // blocks
    values, places = logits.view(blocks, size).max(-1)
    block = values.argmax(0, keepdim=True)
    return (block * size + places[block]).unsqueeze(0)


def embed(model: Any, token: Tensor, hidden: Tensor) -> None:
    """Look a token up (1, 1), and write what it stands for (1, 1, width)."""
    hidden.copy_(model.get_input_embeddings()(token))


def begin(model: Any, hidden: Tensor, place: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotary embedding, cosines and sines, and the mask, of tokens at `place` (1, tokens)."""
    cosines, sines = model.model.rotary_emb(hidden, position_ids=place)
    mask = (seen[None, :] <= place[0][:, None])[None, None]
    if model.config._attn_implementation == "eager":  # which adds it
        mask = torch.where(mask, 0.0, -torch.inf).to(hidden.dtype)
    return cosines, sines, mask


def through(layers: Sequence[nn.Module], caches: Sequence[Cache], hidden: Tensor, place: Tensor,
            made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return what a run of layers makes of `hidden` (1, tokens, width); `made` is what `begin` returned."""
    for layer, cache in zip(layers, caches, strict=True):
        hidden = layer(hidden, attention_mask=made[2], position_embeddings=made[:2], position_ids=place,
                       past_key_values=cache, use_cache=True)
    return hidden


def end(model: Any, hidden: Tensor, logits: Tensor, token: Tensor) -> None:
    """Write the last token's logits (1, vocabulary) and the greedy next token (1, 1)."""
    logits.copy_(model.lm_head(model.model.norm(hidden[:, -1:]))[:, -1])
    token.copy_(greatest(logits))


PARTS = embed, begin, through, end


@dataclasses.dataclass
class Decoder:
    """All state lies in tensors that stay in place.

    Attributes
    ----------
    model : LlamaForCausalLM
    span : int
        Layers compiled as one.
    mode : str
        In which `step` works, once `prepare` was called.
    backend : str or callable
        Of `torch.compile`.
    options : mapping
        For the backend; see `compiler_options`.
    """

    model: Any
    span: int = 4
    mode: str = "eager"
    backend: str | Callable[..., Any] = "inductor"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        where, wide = device(), self.model.config.hidden_size
        self.layers = list(self.model.model.layers)
        for layer in self.layers:
            layer.self_attn.layer_idx = 0  # in a cache of its own: so no number tells layers apart
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=where)
        self.place = torch.zeros(1, 1, dtype=torch.int64, device=where)
        self.seen = torch.arange(ROOM, device=where)
        self.caches = [Cache(layers=[Room(ROOM, self.place)]) for _ in self.layers]
        self.logits = torch.zeros(1, self.model.config.vocab_size, dtype=torch.float32, device=where)
        self.hidden = torch.zeros(1, 1, wide, dtype=torch.bfloat16, device=where)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.parts: tuple[Callable[..., Any], ...] = PARTS

    def prefill(self, prompt: Tensor) -> None:
        """Read a prompt, (1, tokens), into the emptied cache."""
        for cache in self.caches:
            cache.layers[0].reset()
        tokens = prompt.shape[1]
        self.place.zero_()
        self._run(PARTS, self.model.get_input_embeddings()(prompt), self.seen[None, :tokens])
        self.place.fill_(tokens)

    def embed(self) -> None:
        """Look the token up."""
        self.parts[0](self.model, self.token, self.hidden)

    def body(self) -> None:
        """Do the rest of a step."""
        self._run(self.parts, self.hidden, self.place)
        self.place.add_(1)

    def whole(self) -> None:
        """Do a step."""
        self.embed()
        self.body()

    def _run(self, parts: tuple[Callable[..., Any], ...], hidden: Tensor, place: Tensor) -> None:
        _, first, run, last = parts
        made = first(self.model, hidden, place, self.seen)
        for start in range(0, len(self.layers), self.span):
            chosen = slice(start, start + self.span)
            hidden = run(tuple(self.layers[chosen]), tuple(self.caches[chosen]), hidden, place, made)
        last(self.model, hidden, self.logits, self.token)

    def prepare(self, mode: str) -> dict[str, Any]:
        """Compile and capture the step as the mode says, if it can be; return numbers, among them the mode taken."""
        self.graph, self.parts, numbers = None, PARTS, dict[str, Any]()
        chosen = list(MODES[MODES.index(mode) :])
        if mode == COMPILED:
            numbers = self._compile()
            if "not_compiled" in numbers:
                print(f"    not compiled: {numbers['not_compiled']}", flush=True)
                chosen = list(MODES[1:])
        if device().type == "cpu":
            self.mode = chosen[0] if chosen[0] == COMPILED else "eager"
            return {**numbers, "mode": self.mode}
        while chosen[0] != "eager":
            work = self.body if chosen[0] == "graph, embedding apart" else self.whole
            work()
            reason = capturable(work)
            if not reason:
                self.graph = capture(work)
                break
            print(f"    not as '{chosen[0]}': {reason}", flush=True)
            self.parts = PARTS
            chosen = list(MODES[1:]) if chosen[0] == COMPILED else chosen[1:]
        self.mode = chosen[0]
        return {**numbers, "mode": self.mode}

    def _compile(self) -> dict[str, Any]:
        """Compile a step by doing one; without graph breaks if it can be. Return how, or why not."""
        from torch._dynamo import utils as dynamo

        reason = ""
        for whole, looked_up in ((True, True), (True, False), (False, False)):
            torch._dynamo.reset()
            dynamo.counters.clear()
            began = time.perf_counter()
            self.parts = tuple(
                torch.compile(part, fullgraph=whole, dynamic=False, backend=self.backend,
                              options=dict(self.options) or None) if looked_up or part is not embed else part
                for part in PARTS)
            try:
                with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
                    self.whole()
                    seconds, graphs = time.perf_counter() - began, dynamo.counters["stats"]["unique_graphs"]
                    self.whole()
                if dynamo.counters["stats"]["unique_graphs"] > graphs:
                    raise RuntimeError("a second step is compiled anew")  # so might be the one that is captured
            except Exception as error:  # whatever the compiler says, there is another way
                if isinstance(error, torch.AcceleratorError):
                    raise  # the device's state is not to be trusted
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                how = f"{'without' if whole else 'with'} graph breaks{'' if looked_up else ', the embedding apart,'}"
                print(f"    compiling {how} failed: {reason}", flush=True)
                continue
            return {"compile_s": seconds, "compilations": graphs, "span": self.span, "embedding_compiled": looked_up,
                    "breaks": sum(dynamo.counters["graph_break"].values())}
        self.parts = PARTS
        return {"not_compiled": reason}

    def step(self) -> None:
        """Do a step in the mode prepared."""
        if self.graph is None:
            self.whole()
            return
        if self.mode == "graph, embedding apart":
            self.embed()
        self.graph.replay()

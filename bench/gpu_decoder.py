"""A decoding step of a Llama: a token in, the greedy next one out, over transformers' static cache.

Modes, each a CUDA graph where the device is a GPU:

* "graph": transformers' own code, kernel by kernel.
* "compiled": the same code through `torch.compile` (Inductor), which fuses what lies between the products. A run of
  `span` layers is compiled, once: all runs look the same to the compiler. The embedding stays as it is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from gpu_run import capturable, capture, device

MODES = ("compiled", "graph", "graph, embedding apart", "eager")
COMPILED = MODES[0]
ROOM = 256  # tokens, of the static cache
RECOMPILATIONS = 64  # at most, of one function


def begin(model: Any, hidden: Tensor, place: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotary embedding, cosines and sines, and the mask, of tokens at `place` (1, tokens)."""
    cosines, sines = model.model.rotary_emb(hidden, position_ids=place)
    return cosines, sines, (seen[None, :] <= place[0][:, None])[None, None]


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
    token.copy_(logits.argmax(-1, keepdim=True))


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
    """

    model: Any
    span: int = 4
    mode: str = "eager"

    def __post_init__(self) -> None:
        where, wide = device(), self.model.config.hidden_size
        self.layers = list(self.model.model.layers)
        self.rooms = [StaticLayer(ROOM) for _ in self.layers]
        self.caches = [Cache(layers=[room]) for room in self.rooms]
        for layer in self.layers:
            layer.self_attn.layer_idx = 0  # in a cache of its own: so no number tells layers apart
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=where)
        self.place = torch.zeros(1, 1, dtype=torch.int64, device=where)
        self.seen = torch.arange(ROOM, device=where)
        self.logits = torch.zeros(1, self.model.config.vocab_size, dtype=torch.float32, device=where)
        self.hidden = torch.zeros(1, 1, wide, dtype=torch.bfloat16, device=where)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.parts: tuple[Callable[..., Any], ...] = (begin, through, end)

    def prefill(self, prompt: Tensor) -> None:
        """Read a prompt, (1, tokens), into the emptied cache."""
        for room in self.rooms:
            if room.is_initialized:
                room.keys.zero_()
                room.values.zero_()
                room.cumulative_length.zero_()
        tokens = prompt.shape[1]
        self._run((begin, through, end), self.model.get_input_embeddings()(prompt), self.seen[None, :tokens])
        self.place.fill_(tokens)
        for room in self.rooms:  # transformers marks these as of fixed address, which sets layers apart
            for held in (room.keys, room.values, room.cumulative_length):
                vars(held).pop("_dynamo_static_input_type", None)

    def embed(self) -> None:
        """Look the token up."""
        self.hidden.copy_(self.model.get_input_embeddings()(self.token))

    def body(self) -> None:
        """Do the rest of a step."""
        self._run(self.parts, self.hidden, self.place)
        self.place.add_(1)

    def whole(self) -> None:
        """Do a step."""
        self.embed()
        self.body()

    def _run(self, parts: tuple[Callable[..., Any], ...], hidden: Tensor, place: Tensor) -> None:
        made = parts[0](self.model, hidden, place, self.seen)
        for start in range(0, len(self.layers), self.span):
            chosen = slice(start, start + self.span)
            hidden = parts[1](tuple(self.layers[chosen]), tuple(self.caches[chosen]), hidden, place, made)
        parts[2](self.model, hidden, self.logits, self.token)

    def prepare(self, mode: str) -> dict[str, Any]:
        """Compile and capture the step as the mode says, if it can be; return numbers, among them the mode taken."""
        self.graph, self.parts, numbers = None, (begin, through, end), dict[str, Any]()
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
            self.parts = (begin, through, end)
            chosen = list(MODES[1:]) if chosen[0] == COMPILED else chosen[1:]
        self.mode = chosen[0]
        return {**numbers, "mode": self.mode}

    def _compile(self) -> dict[str, Any]:
        """Compile a step by doing one; without graph breaks if it can be. Return how, or why not."""
        from torch._dynamo import utils as dynamo

        reason = ""
        for whole in (True, False):
            torch._dynamo.reset()
            dynamo.counters.clear()
            began = time.perf_counter()
            self.parts = tuple(torch.compile(part, fullgraph=whole, dynamic=False) for part in (begin, through, end))
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
                print(f"    compiling {'without' if whole else 'with'} graph breaks failed: {reason}", flush=True)
                continue
            return {"compile_s": seconds, "compilations": graphs, "span": self.span,
                    "breaks": sum(dynamo.counters["graph_break"].values())}
        self.parts = (begin, through, end)
        return {"not_compiled": reason}

    def step(self) -> None:
        """Do a step in the mode prepared."""
        if self.graph is None:
            self.whole()
            return
        if self.mode == "graph, embedding apart":
            self.embed()
        self.graph.replay()

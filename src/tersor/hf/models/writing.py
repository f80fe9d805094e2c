"""Text that a model writes itself: of the kind that it was trained on, as far as it knows it.

As Liu et al. do where there is no training data (LLM-QAT, 2023, section 2.1): the first token is any of the vocabulary,
some more are the likeliest ones, and all others are drawn by the probabilities that the model gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from tersor.errors import ModelError
from tersor.files import seal
from tersor.hf.models.flow import in_order
from tersor.hf.models.hollow import load_dense
from tersor.hf.models.matrices import refused
from tersor.hf.models.source import Source

LIKELIEST = 4  # tokens behind the first one that are not drawn, so that it may begin something
SEED = 8  # hexadecimal digits: a processor's generator reads no more
AT_ONCE, AT_ONCE_GPU = 64, 256  # windows: a step reads all weights, however many there are


class Roomy(DynamicLayer):
    """Keys and values of a layer, with room for a whole window: transformers' own copies all of them for each token.

    Parameters
    ----------
    room : int
        Tokens of a window.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._count = room, 0
        self._both: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (windows, heads, tokens, dim); return all that there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._both = [new.new_empty(*new.shape[:2], self._room, new.shape[3]) for new in (key_states, value_states)]
        begin, self._count = self._count, self._count + key_states.shape[2]
        for held, new in zip(self._both, (key_states, value_states), strict=True):
            held[:, :, begin : self._count] = new
        self.keys, self.values = (held[:, :, : self._count] for held in self._both)
        return self.keys, self.values


class Draw(LogitsProcessor):
    """Make the largest logit that of a token drawn by its probability: of logits with Gumbel noise the largest is one.

    So a search for the likeliest token draws, by a generator of its own.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits (windows, vocabulary), with noise once the likeliest tokens are there."""
        if input_ids.shape[1] <= LIKELIEST:
            return scores
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self._generator)
        return scores.float() - noise.log()


def write(source: Source, count: int, context: int, seed: int, device: str = "cpu",
          step: Callable[[int, int], None] | None = None) -> Tensor:
    """Return `count` windows of token ids that a model writes, int64 (count, context); one seed, one text.

    The end of a document ends nothing: another one begins.

    Parameters
    ----------
    step : callable or None
        Called with the windows that are done, and their number.

    Raises
    ------
    ModelError
        If transformers cannot generate with the model.
    """
    model: Any = load_dense(source, device)
    if not model.can_generate():
        raise ModelError(f"{source.path}: transformers cannot generate text with {type(model).__name__}")
    model.generation_config = GenerationConfig()  # its own may end, or forbid repetition
    rows = model.get_input_embeddings().num_embeddings
    size = AT_ONCE if torch.device(device).type == "cpu" else AT_ONCE_GPU

    def one(batch: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(int(seal([seed, batch])[:SEED], 16))
        begun = torch.randint(rows, (min(size, count - batch * size), 1), generator=generator, device=device)
        cache = DynamicCache(config=model.config)
        cache.layers = [Roomy(context) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        how = GenerationConfig(do_sample=False, max_new_tokens=context - 1, use_cache=True, pad_token_id=0)
        with refused(f"{source.path}: transformers cannot generate text with it"):
            return model.generate(begun, generation_config=how, attention_mask=torch.ones_like(begun),
                                  past_key_values=cache, logits_processor=LogitsProcessorList([Draw(generator)])).cpu()

    found: list[Tensor] = []
    for done, windows in enumerate(in_order(-(-count // size), one, devices=[torch.device(device)]), 1):
        found.append(windows)
        if step is not None:
            step(min(count, done * size), count)
    return torch.cat(found)

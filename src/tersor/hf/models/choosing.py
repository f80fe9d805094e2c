"""How the next tokens are chosen, written and ended on the device, as transformers' loop does it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tersor.hf.models.stepping import DeclinedError

BARRING = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
# which hold no state and wait for no number of the device
PURE = (*BARRING, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper)
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call of `generate` asks for.

    Attributes
    ----------
    length : int
        Tokens of a sequence at most, its prompt among them.
    ends : Tensor or None
        (n,): tokens that end a sequence.
    pad : int or None
        The token after an end; None for the first of `ends`.
    barred : tuple
        Pairs of tokens (n,) and the length before which they are not chosen.
    processors : LogitsProcessorList or None
        What the host calls for each token; None where a token is chosen within the captured step.
    sample : bool
    """

    length: int
    ends: Tensor | None
    pad: int | None
    barred: tuple[tuple[Tensor, int], ...]
    processors: LogitsProcessorList | None
    sample: bool

    @property
    def captured(self) -> tuple[bool, ...]:
        """Tell which steps may be one captured graph: those of plans for which this is the same."""
        if self.processors is not None:
            return ()
        return self.ends is not None, bool(self.barred)


def planned(config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> Plan:
    """Return what is asked for.

    Raises
    ------
    DeclinedError
        If it is something that only transformers' loop does.
    """
    if config.get_generation_mode() not in MODES:
        raise DeclinedError("it is neither greedy nor plain sampling")
    others = [type(one).__name__ for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    others += [type(one).__name__ for one in processors if type(one) not in PURE]
    if others:
        raise DeclinedError(f"{others[0]} is for transformers' loop")
    lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
    ends = [torch.as_tensor(one.eos_token_id).flatten() for one in criteria if isinstance(one, EosTokenCriteria)]
    if not lengths or len(ends) > 1:
        raise DeclinedError("there is no greatest length, or two sets of tokens end a sequence")
    sample = bool(config.do_sample)
    barred = []
    for one in processors:
        if isinstance(one, MinLengthLogitsProcessor):
            barred.append((torch.as_tensor(one.eos_token_id).flatten(), one.min_length))
        elif isinstance(one, MinNewTokensLengthLogitsProcessor):
            barred.append((torch.as_tensor(one.eos_token_id).flatten(), one.prompt_length_to_skip + one.min_new_tokens))
    if sample or len(barred) < len(processors):
        return Plan(min(lengths), ends[0] if ends else None, config.pad_token_id, (), processors, sample)
    return Plan(min(lengths), ends[0] if ends else None, config.pad_token_id, tuple(barred), None, sample)


class Texts:
    """Sequences as they grow, in tensors that stay where they are.

    Attributes
    ----------
    ids : Tensor
        int64 (batch, room).
    live : Tensor
        bool (): whether a sequence has not ended.
    length : Tensor
        int64 (): tokens of a sequence that are written and stand.

    Parameters
    ----------
    batch, room, words : int
        Sequences, tokens of each at most, and tokens to choose from.
    device : torch.device
    """

    def __init__(self, batch: int, room: int, words: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self.live = torch.ones((), dtype=torch.bool, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self._unfinished = torch.ones(batch, dtype=torch.int64, device=device)
        self._pad = torch.zeros(1, dtype=torch.int64, device=device)
        self._ends = torch.zeros(words, dtype=torch.bool, device=device)
        self._least = torch.zeros(words, dtype=torch.int64, device=device)

    def tensors(self) -> list[Tensor]:
        """Return what a step writes to."""
        return [self.ids, self.live, self.length, self._unfinished]

    def begin(self, ids: Tensor, prompt: int, plan: Plan) -> None:
        """Take sequences (batch, tokens), the first `prompt` of which were given."""
        self.ids[:, : ids.shape[1]] = ids
        self.length.fill_(ids.shape[1])
        self.live.fill_(True)
        self._unfinished.fill_(1)
        self._ends.fill_(False)
        self._least.zero_()
        for tokens, length in plan.barred:
            known = self._known(tokens)
            self._least[known] = self._least[known].clamp(min=length)
        if plan.ends is not None:
            self._ends[self._known(plan.ends)] = True
            self._pad.copy_(plan.ends[:1] if plan.pad is None else torch.tensor([plan.pad]))
            self._unfinished.copy_(~self._ends[ids[:, prompt:]].any(1))

    def _known(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.ids.device)
        return tokens[(tokens >= 0) & (tokens < len(self._ends))]

    def ended(self) -> bool:
        """Tell whether all sequences have ended; waits for the device."""
        return not bool(self._unfinished.any())

    def choose(self, logits: Tensor, place: Tensor, token: Tensor, plan: Plan, count: int) -> None:
        """Choose the tokens that follow, and write them.

        Parameters
        ----------
        logits : Tensor
            float32 (batch, words); processors may write to them.
        place : Tensor
            int64 (1,): where the tokens are written.
        token : Tensor
            int64 (batch, 1): the tokens are written there too.
        plan : Plan
        count : int
            Tokens before; used where the plan has processors.
        """
        scores = logits
        if plan.processors is not None:
            scores = plan.processors(self.ids[:, :count], logits)  # pyright: ignore[reportArgumentType]
        elif plan.barred:
            scores = logits.masked_fill(place < self._least, -math.inf)
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if plan.sample else scores.argmax(-1)
        if plan.ends is not None:
            chosen = chosen * self._unfinished + self._pad * (1 - self._unfinished)
            self.length.add_(self.live)
            self._unfinished.mul_(~self._ends[chosen])
            self.live.copy_(self._unfinished.any())
        self.ids.index_copy_(1, place, chosen[:, None])
        token.copy_(chosen[:, None])

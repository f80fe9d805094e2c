"""What recovery reads and how much of it: the text in batches, the original's answers, and the steps that are taken."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor
from tersor.errors import ModelError
from tersor.files import seal
from tersor.hf.compress.checkpoint import Checkpoint
from tersor.hf.compress.request import Progress
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.evaluate import Original
from tersor.hf.models.source import Source
from tersor.hf.models.text import default_calibration, read_ids, text_source, windows
from tersor.hf.models.writing import write
from tersor.hf.recover.student import vectors_of
from tersor.hf.recover.training import Lesson, halves

RECORD = "recovery"  # in a manifest's provenance
AT_ONCE, AT_ONCE_GPU = 1024, 2048  # tokens run at a time: a GPU waits for launches otherwise
STEP = 4096  # tokens of a step
MOVE = 2048  # tokens of a step between encodings: of so many numbers, many short steps move more than few
LOOK = 8192  # tokens kept apart that are looked at before and after each training between encodings
APART = 16  # one window in so many is kept apart
LEAST = 8  # windows, of which one or more are kept apart
TOKENS = 262144  # of a text, at most
OWN = 0.5  # of the windows, those that the original writes: what is trained on one kind of text forgets others
PASSES = 2.0  # times that a text is read to train what is stored as numbers
MOVES = 3.0  # times that it is read between encodings
END = 1 / 3  # of these, the times that it is read to train what is stored as numbers, after all is encoded
BYTES = 20  # a parameter: the original, weights, weights without scales, gradients of two batches
MOVING = 40  # a parameter: weights, what they were, the best and the present ones, two means, gradients
PARTLY = 0.6  # of a model, what is run between encodings: blocks that are not encoded yet
WRITING = 2.5  # passes of a token that is read, in the time of one that is written: many short products


@dataclasses.dataclass(frozen=True)
class RecoverSettings:
    """How a compressed model is trained.

    Attributes
    ----------
    text : Path or None
        Calibration text; None uses the packaged one.
    tokens : int
        Of the text, at most.
    passes : float
        Times that the text is read to train what is stored as numbers.
    moves : float
        Times that it is read between encodings, to train what is not encoded yet; 0: all is encoded already.
    blocks : bool
        A block is trained by what it returns, and nothing outside of it, also not at the end: one is resident at a
        time.
    context : int
        Tokens of a window.
    heldout : Path or None
        Text to evaluate on; None uses the packaged one.
    evaluation_tokens : int
        Tokens of it; 0 skips the evaluation.
    """

    text: Path | None = None
    tokens: int = TOKENS
    passes: float = PASSES
    context: int = 512
    seed: int = 0
    device: str = "cpu"
    resume: bool = True
    heldout: Path | None = None
    evaluation_tokens: int = 8192
    moves: float = 0.0
    blocks: bool = False
    own: float | None = None

    @property
    def written(self) -> float:
        """The share of the windows that the original writes."""
        return (0.0 if self.blocks else OWN) if self.own is None else self.own

    @property
    def at_once(self) -> int:
        """Tokens that run through the model at a time; one window at least."""
        return max(self.context, AT_ONCE_GPU if torch.device(self.device).type == "cuda" else AT_ONCE)

    @property
    def read(self) -> Path:
        """The calibration text."""
        return self.text or default_calibration()

    def record(self, source: Source) -> dict[str, Any]:
        """Return what a manifest says of the recovery; its length does not depend on what comes of it."""
        moves = {"moves": self.moves} if self.moves else {}
        moves |= {"blocks": True} if self.blocks else {}
        return {RECORD: {"source": text_source(self.read), "own": self.written, "tokens": self.tokens,
                         "passes": self.passes, **moves,
                         "seed": self.seed, "vectors": vectors_of(source)}}

    def memory(self, elements: int) -> int:
        """Return the bytes that trainings of so many elements, the model's or a block's, hold besides activations."""
        return (MOVING if self.moves else BYTES) * elements

    def forwards(self) -> float:
        """Return the tokens that pass the model, forward and back (as two more), the original's included."""
        read = 3 * (self.passes + PARTLY * self.moves) * self.tokens
        return read + ((2 if self.moves else 1) + WRITING * self.written) * self.tokens

    def texts(self, source: Source) -> tuple[Tensor, int]:
        """Return the windows of the given text that are read, int64 (count, context), and how many are to be written.

        Raises
        ------
        ModelError
            If there is too little text, or passes or the share of own text are out of bounds.
        """
        for passes in (self.passes, self.moves or self.passes):
            if not 0 < passes <= 1000:
                raise ModelError(f"passes of the text must lie above 0 and up to 1000, found {passes}")
        if not 0 <= self.written <= 1:
            raise ModelError(f"the share of text that the original writes lies in 0 to 1, found {self.written}")
        if self.blocks and self.written:
            raise ModelError("a recovery by blocks never has the whole original, which so cannot write text; leave out "
                             "--recover-own or --recover-blocks")
        every = windows(read_ids(source, self.read, self.context, self.tokens), self.context)
        room = self.tokens // self.context
        total = room if self.written == 1 else min(room, round(len(every) / (1 - self.written)))
        if min(total, len(every)) < LEAST:
            raise ModelError(f"{self.read}: {every.numel()} tokens make {len(every)} windows of {self.context}; "
                             f"recovery needs at least {LEAST}; give a longer text, more --tokens or a shorter "
                             "--context")
        given = min(len(every), total - round(self.written * total))
        return every[torch.arange(given) * len(every) // max(1, given)], total - given

    def lesson(self, given: Tensor, written: Tensor) -> Lesson:
        """Return windows of both kinds in batches; of each kind some are kept apart."""
        kept = [torch.arange(len(kind)) % APART == min(LEAST, len(kind)) - 1 for kind in (given, written)]
        size = self.at_once // self.context
        apart, rest = (_mixed(given[first], written[second]).split(size)
                       for first, second in (kept, [~mask for mask in kept]))
        lesson = Lesson([*apart, *rest], len(apart), max(1, STEP // self.at_once), 0, self.seed)
        return dataclasses.replace(lesson, steps=max(1, steps_of(lesson, self.passes)))


def _mixed(first: Tensor, second: Tensor) -> Tensor:
    """Return the windows of both, each kind's in its order, evenly among the other's."""
    places = torch.cat([(torch.arange(len(kind)) + 0.5) / max(1, len(kind)) for kind in (first, second)])
    return torch.cat([first, second])[places.argsort(stable=True)]


def steps_of(lesson: Lesson, passes: float) -> int:
    """Return the steps in which a text is read so many times."""
    return round(passes * (len(lesson.batches) - lesson.apart) / lesson.each)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What came of a training between two encodings.

    Attributes
    ----------
    stage, group : int
        The block, counted from 0, and its group of matrices that is encoded next.
    before, after : float
        KL on the text kept apart, in nats a token, or by blocks the relative squared distance of what the block
        returns; of the weights that there were, and of what is kept.
    """

    stage: int
    group: int
    before: float
    after: float


class Course:
    """A text that a model is trained on, and its original, whose answers are made once for all trainings.

    Parameters
    ----------
    source : Source
    settings : RecoverSettings
    work : WorkFolder
        Where own text is kept, and activations that find no room in memory.
    progress : Progress

    Attributes
    ----------
    settings : RecoverSettings
    lesson : Lesson
        Of the training at the end.
    between : Lesson
        Of all trainings between encodings, as if they were one.
    phases : list of Phase
        What came of these.
    """

    def __init__(self, source: Source, settings: RecoverSettings, work: WorkFolder, progress: Progress) -> None:
        self.settings, self._source, self._work, self._progress = settings, source, work, progress
        given, count = settings.texts(source)
        self.lesson = settings.lesson(given, self._written(count) if count else given[:0])
        each, looks = (max(1, tokens // settings.at_once) for tokens in (MOVE, LOOK))
        self.between = dataclasses.replace(self.lesson, each=each, checks=1, looks=looks, constant=True)
        self.between = dataclasses.replace(self.between, steps=steps_of(self.between, settings.moves))
        self.phases: list[Phase] = []

    @functools.cached_property
    def mark(self) -> str:
        """A digest of what trained parts depend on besides what they were."""
        device = torch.device(self.settings.device)
        return seal([tersor.__version__, self._source.fingerprint, self.settings.record(self._source),
                     self.settings.context, device.type, halves(device)])

    def _written(self, count: int) -> Tensor:
        """Return what the original writes, from a file where an earlier run has got so far."""
        saved = Checkpoint(self._work / "written", seal([self.mark, count]))
        known = saved.read()
        if known is not None:
            return known[0]["ids"]
        self._progress("write", 0, count)
        ids = write(self._source, count, self.settings.context, self.settings.seed, self.settings.device,
                    lambda done, total: self._progress("write", done, total))
        saved.save({"ids": ids}, {})
        return ids

    @functools.cached_property
    def _original(self) -> Original:
        self._progress("teacher", 0, 1)
        return Original(self._source, self.lesson.batches, self.settings.device,
                        lambda done, total: self._progress("teacher", done, total),
                        self._work / "activations" / "teacher")

    def teacher(self, batch: int) -> tuple[Tensor, bool]:
        """Return the original's logits of a batch."""
        return self._original(batch)

    def shares(self, stage: int, stages: int, groups: int) -> list[int]:
        """Return the steps of trainings before each group of a stage: all stages and groups get about as many."""
        if stage >= stages:
            return [0] * groups
        begin, end = (self.between.steps * at // stages for at in (stage, stage + 1))
        return [(end - begin) * (at + 1) // groups - (end - begin) * at // groups for at in range(groups)]

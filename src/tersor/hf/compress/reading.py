"""Calibration text and the model that reads it, block by block."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import tersor
from tersor.files import seal
from tersor.hf.compress.checkpoint import Checkpoint
from tersor.hf.compress.request import Sampling
from tersor.hf.models.classes import check_text, model_class
from tersor.hf.models.flow import Activations, Flow
from tersor.hf.models.hollow import Hollow
from tersor.hf.models.matrices import Matrix
from tersor.hf.models.source import Source, read_matrix
from tersor.hf.models.streamed import Streamed
from tersor.hf.models.text import read_ids, text_source, windows
from tersor.planning.calibration import Calibration

BATCH_TOKENS = 4096  # run at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Calibration text, cut into windows, and who reads it.

    Attributes
    ----------
    source : Source
    sequences : Tensor
        Token ids (windows, context).
    text : str
        The file's name and digest.
    sampling : Sampling
    devices : tuple of str
        Of one kind; batches are shared out among them.
    whole : bool
        Keep all weights in memory at once.
    folder : Path
        Where activations go that find no room in memory.
    position : list of int
        The stage that is worked on, and the number of blocks.
    """

    source: Source
    sequences: Tensor
    text: str
    sampling: Sampling
    devices: tuple[str, ...]
    whole: bool
    folder: Path
    position: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, source: Source, text: Path, sampling: Sampling, folder: Path, *,
           devices: Sequence[str] = ("cpu",), whole: bool = False) -> Reading:
        """Return the reading of a text file; `folder` is made when it is needed.

        Raises
        ------
        ModelError
            If the model reads no text, or the text cannot be read or is too short.
        """
        check_text(model_class(source.config))
        sequences = windows(read_ids(source, text, sampling.context, sampling.tokens), sampling.context)
        return cls(source, sequences, text_source(text), sampling, tuple(devices), whole, folder)

    @property
    def place(self) -> str:
        """The stage that is worked on, in words."""
        if not self.position or self.whole:
            return ""
        stage, blocks = self.position
        return f"block {stage + 1} of {blocks}" if stage < blocks else "outside the blocks"

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.sequences.numel()

    @functools.cached_property
    def mark(self) -> str:
        """A digest of all that sums over the text depend on."""
        return seal([tersor.__version__, self.source.fingerprint, self.text, dataclasses.asdict(self.sampling),
                     torch.device(self.devices[0]).type, BATCH_TOKENS])

    @property
    def seen(self) -> Calibration:
        """What there is to say of the text before it is read: no moments, no sensitivities."""
        return Calibration({}, self.tokens, self.text, sha256=self.mark)

    def proven(self) -> set[str]:
        """Prove that the model runs block by block; return the matrices that were read for it, all of finite numbers.

        Raises
        ------
        ModelError
            If it does not; or NonFiniteError, if a matrix holds NaN or infinity.
        """
        found = Streamed(Hollow(self.source, self.devices[0]), self.sequences, whole=self.whole)
        inner = [m for stage in range(len(found.blocks)) for m in found.matrices(stage)]
        outer = [m for m in found.matrices(len(found.blocks)) if not found.hollow.parameter(m.parameter).is_meta]
        return {m.name for m in (*inner, *outer)}

    def streamed(self, like: Streamed | None = None) -> Streamed:
        """Return the dense model, proven to run block by block.

        Parameters
        ----------
        like : Streamed or None
            Another one, whose weights are copied where they are in memory.

        Raises
        ------
        ModelError
            If it does not; or NonFiniteError, if a matrix holds NaN or infinity.
        """
        hollow = Hollow(self.source, self.devices[0], None if like is None else like.hollow)
        found = Streamed(hollow, self.sequences, whole=self.whole)
        for place, device in enumerate(self.devices[1:], 1):
            model = Hollow(self.source, device, hollow if like is None else like.copies[place].hollow)
            found.copies.append(Streamed(model, self.sequences, whole=self.whole))
        return found

    def flow(self, streamed: Streamed, name: str, tokens: int | None = None) -> Flow:
        """Return the text at the model's entrance: all windows, or evenly spaced ones of about so many tokens."""
        every = 1 if tokens is None else max(1, self.tokens // tokens)
        batches = self.sequences[::every].split(max(1, BATCH_TOKENS // self.sampling.context))
        return Flow(streamed, batches, Activations(self.folder / name))


class Place:
    """Where flows stand: saved from time to time between blocks, so that a killed run need not go all the way anew.

    Parameters
    ----------
    checkpoint : Checkpoint
    flows : Flow
        Of one model.
    """

    def __init__(self, checkpoint: Checkpoint, *flows: Flow) -> None:
        self._checkpoint, self._flows = checkpoint, flows

    def resume(self, latest: int) -> int:
        """Take up what was saved at a stage up to `latest`, if anything was; return the stage to go on with."""
        found = self._checkpoint.read()
        if found is None or found[1]["stage"] > latest:
            return 0
        for number, flow in enumerate(self._flows):
            held = {key.partition(":")[2]: t for key, t in found[0].items() if key.startswith(f"{number}:")}
            flow.kept.restore(held, flow.streamed.hollow.device)
        return int(found[1]["stage"])

    def passed(self, stage: int) -> None:
        """Save, if it is time: batches have passed a stage."""
        if self._checkpoint.due():
            tensors = {f"{number}:{key}": tensor for number, flow in enumerate(self._flows)
                       for key, tensor in flow.kept.tensors().items()}
            self._checkpoint.save(tensors, {"stage": stage + 1})

    def drop(self) -> None:
        """Remove what was saved: the flows have come to their end."""
        self._checkpoint.drop()


def steps(stages: int, tokens: int, tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Return what takes a stage and tokens done in it, and tells what is done of all stages."""
    def step(stage: int, done: int) -> None:
        tell(stage * tokens + done, stages * tokens)
    return step


def dense_of(streamed: Streamed, matrix: Matrix) -> Tensor:
    """Return a matrix (out, in) of the resident weights, or read it where no text reaches its module."""
    held = streamed.hollow.parameter(matrix.parameter)
    if held.is_meta:
        return read_matrix(streamed.hollow.source, matrix, str(streamed.hollow.device))
    return matrix.take(held.detach())


def check_numbers(source: Source, reading: Reading | None, device: str) -> None:
    """Find and name NaN and infinity before anything runs: what the proof that text runs has not looked at is read."""
    proven = set[str]() if reading is None else reading.proven()
    for matrix in source.layout.matrices.values():
        if matrix.name not in proven:
            read_matrix(source, matrix, device)

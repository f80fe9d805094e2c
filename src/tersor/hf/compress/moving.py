"""Recovery while blocks are encoded: what is not encoded yet is trained to make up for what is.

Before a group of matrices is encoded, all that is not encoded yet (this group, too) is trained by KL of logits against
the original. So codes are made of weights that have moved. Errors in the report are still those against the source.

By blocks only what is left of a block is trained, by what the original's block returns: one is resident at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, seal, tell_damaged
from tersor.hf.compress.checkpoint import Checkpoint, Pace
from tersor.hf.compress.course import Course, Phase
from tersor.hf.compress.desk import Puts, Wanted, decode_into
from tersor.hf.compress.reading import Place, Reading, dense_of
from tersor.hf.compress.request import Progress
from tersor.hf.compress.survey import beside, outside_of
from tersor.hf.compress.work import WorkFolder
from tersor.hf.models.flow import Activations, Flow
from tersor.hf.models.matrices import Matrix
from tersor.hf.recover.mover import BlockMover, Mover, output_of
from tersor.hf.recover.training import Moments, Teacher, Training, distance, divergence

RIDGE = 3.0  # times the mean square of an input: what holds a matrix to what it has moved to; docs/log.md
FOLDER = "moved"  # in the work folder: weights as they are at the entrance of a block
OFF = 0.05  # a block's relative squared distance from which steps are the longest; docs/log.md
READ = ("dense", "encoded", "lesson", "wanted")  # folders of activations


class Tally:
    """Tells of matrices that are encoded and of steps that are taken between, as one.

    Parameters
    ----------
    progress : Progress
    steps : int
        Of all trainings.
    """

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps
        self._matrices, self._trained = (0, 0), 0

    def encoded(self, stage: str, done: int, total: int) -> None:
        """Take note of matrices."""
        self._matrices = done, total
        self._progress(stage, done + self._trained, total + self._steps)

    def trained(self, steps: int) -> None:
        """Take note of steps."""
        self._trained = steps
        self.encoded("encode", *self._matrices)


class Moving:
    """Encodes a model block by block, and trains what is left in between.

    Parameters
    ----------
    desk : Desk
    reading : Reading
        Text that shows the moments of inputs.
    course : Course
        Text that is trained on, and the teacher.
    work : WorkFolder
    tell : callable
        Called with the steps that are taken.
    """

    def __init__(self, desk: Puts, reading: Reading, course: Course, work: WorkFolder,
                 tell: Callable[[int], None]) -> None:
        self._desk, self._reading, self._course, self._work, self._tell = desk, reading, course, work, tell
        self._original = reading.streamed()
        self._encoded = reading.streamed(like=self._original)
        self._last = len(self._encoded.blocks)
        self._dense, self._flow = reading.flow(self._original, "dense"), reading.flow(self._encoded, "encoded")
        self._alone = course.settings.blocks
        self._text = Flow(self._encoded, course.lesson.batches, Activations(reading.folder / "lesson"))
        self._wanted = Flow(self._original, course.lesson.batches, Activations(reading.folder / "wanted"))
        self._tables = [m for m in self._encoded.matrices(self._last) if self._encoded.looks_up(m)]
        self._mark = seal([desk.mark, course.mark])
        self._pace = Pace()
        self._taken = 0  # steps of all phases before
        self._moved: dict[str, Tensor] = {}  # float32, where the model may hold fewer bits
        self._moments: dict[str, Moments] = {}

    def run(self) -> None:
        """Encode all; the course has what came of the trainings."""
        ends = outside_of(self._reading, beside(self._work / "survey.jsonl"))
        self._encode(self._tables, ends, None)
        passed = Place(Checkpoint(self._work / "encode.part", self._mark), *self._flows, *self._ahead)
        begin = self._taken_up(next((stage for stage in range(self._last) if not self._finished(stage)), self._last))
        at = passed.resume(begin)
        with contextlib.ExitStack() as stack:
            for stage in range(begin, begin if self._alone else self._last):
                stack.enter_context(self._encoded.resident(stage))
            self._restore(begin)
            for stage in range(at, self._last + 1):
                self._reading.position[:] = stage, self._last
                with self._original.resident(stage), self._encoded.resident(stage):
                    for flow in self._ahead:
                        flow.through(stage, watch=False, keep=True)
                    if stage >= begin:
                        self._save(stage)
                        self._work_on(stage)
                    else:
                        decode_into(self._encoded, self._desk, self._matrices(stage))
                    for flow in self._flows:
                        flow.through(stage, watch=False, keep=True)
                passed.passed(stage)
        passed.drop()
        for folder in (self._work / FOLDER, *(self._reading.folder / name for name in READ)):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _flows(self) -> tuple[Flow, ...]:
        """What passes a stage once it is encoded."""
        return self._dense, self._flow, self._text

    @property
    def _ahead(self) -> tuple[Flow, ...]:
        """What passes a stage before it is worked on: what the original's blocks return is what theirs shall."""
        return (self._wanted,) if self._alone else ()

    def _matrices(self, stage: int) -> list[Matrix]:
        return [m for m in self._encoded.matrices(stage) if m not in self._tables]

    def _finished(self, stage: int) -> bool:
        return all([self._desk.finished(m.name) for m in self._matrices(stage)])

    def _work_on(self, stage: int) -> None:
        """Train and encode the matrices of a stage, group by group."""
        groups = self._groups(stage)
        stages = self._last + (not self._alone and bool(self._matrices(self._last)))
        shares = self._course.shares(stage, stages, len(groups))
        for number, (group, steps) in enumerate(zip(groups, shares, strict=True)):
            left = [m for later in groups[number:] for m in later]
            left += [m for later in range(stage + 1, stage + 1 if self._alone else self._last + 1)
                     for m in self._matrices(later)]
            self._train(stage, number, [m for m in left if not self._encoded.hollow.parameter(m.parameter).is_meta],
                        steps)
            own, change = self._flow.beside(self._dense, stage, keep=False)
            self._encode(group, own, change)

    def _groups(self, stage: int) -> list[list[Matrix]]:
        """Return the matrices of a stage in order of use, those together that read one tensor; others with the last."""
        listed = self._matrices(stage)
        if not listed:
            return []
        with self._encoded.watched(stage), torch.no_grad():
            seen = self._encoded.step(stage, self._flow.batches[0], self._flow.given(0))[1]
        return by_input(listed, seen)

    def _train(self, stage: int, number: int, matrices: Sequence[Matrix], steps: int) -> None:
        """Train matrices; they stay as they were where it does not help."""
        if not matrices or not steps:
            return
        lesson = dataclasses.replace(self._course.between, steps=steps, begin=self._taken)
        saved = Checkpoint(self._work / "recover.part", seal([self._mark, stage, number]))
        with (BlockMover if self._alone else Mover)(self._text, stage, matrices, self._moved) as mover:
            training = Training(mover, self._teacher(stage), lesson, saved,
                                lambda done: self._tell(self._taken + done), self._moments,
                                loss=distance if self._alone else divergence, full=OFF if self._alone else None)
            outcome = training.run()
        self._moved, self._moments = outcome.values, training.moments()
        saved.drop()
        self._taken += steps
        self._tell(self._taken)
        self._course.phases.append(Phase(stage, number, outcome.before, outcome.after))

    def _teacher(self, stage: int) -> Teacher:
        """Return what the original makes of a batch: logits, or what its block has returned."""
        if not self._alone:
            return self._course.teacher
        listed = self._encoded.blocks[stage].list
        return lambda batch: (output_of(self._wanted.given(batch)[listed]), False)

    def _encode(self, matrices: Sequence[Matrix], moments: Mapping[str, Tensor],
                change: Mapping[str, Tensor] | None) -> None:
        """Encode matrices by moments of their inputs; with a change, near what they have moved to."""
        device = self._encoded.hollow.device
        own, off = ({name: tensor.to(device) for name, tensor in held.items()} for held in (moments, change or {}))

        def aim(matrix: Matrix) -> Tensor | None:
            return None if change is None else self._moved.get(matrix.name)

        self._desk.encode([Wanted(m.name, lambda m=m: (dense_of(self._original, m),),
                                  (own.get(m.name), off.get(m.name), aim(m)), m.name in own, RIDGE) for m in matrices])
        decode_into(self._encoded, self._desk, matrices)

    def _file(self, stage: int) -> Path:
        return self._work / FOLDER / f"{stage:06d}.safetensors"

    def _save(self, stage: int) -> None:
        """Keep what has moved, for a run that goes on with this stage, if it is time: that is 12 bytes a weight."""
        file = self._file(stage)
        if not stage or file.exists() or not self._pace.due():
            return
        left = [m for later in range(stage, self._last + 1) for m in self._matrices(later)]
        tensors = {m.name: self._moved[m.name] for m in left if m.name in self._moved}
        tensors |= {f"{name}:{key}": tensor for name, held in self._moments.items() if name in tensors
                    for key, tensor in held.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._pace.saving():
            save_sealed(tensors, file, {"job": self._mark, "taken": self._taken,
                                        "phases": [dataclasses.astuple(phase) for phase in self._course.phases]})
        for old in file.parent.iterdir():
            if old.name < file.name:
                old.unlink()

    def _taken_up(self, latest: int) -> int:
        """Return the last stage up to `latest` whose entrance was kept as this run would; 0 if none was."""
        return next((stage for stage in range(latest, 0, -1) if self._kept(stage) is not None), 0)

    def _kept(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self._file(stage).exists():
            return None
        try:
            found = load_sealed(self._file(stage))
        except CorruptStoreError as error:
            tell_damaged(error)
            return None
        return found if found[1].get("job") == self._mark else None

    def _restore(self, stage: int) -> None:
        """Take up what was kept at the entrance of a stage."""
        found = self._kept(stage) if stage else None
        if found is None:
            shutil.rmtree(self._work / FOLDER, ignore_errors=True)
            return
        matrices = {m.name: m for later in range(stage, self._last + 1) for m in self._matrices(later)}
        device = self._encoded.hollow.device
        self._moved = {name: tensor.to(device, copy=True) for name, tensor in found[0].items() if name in matrices}
        for name, held in self._moved.items():
            self._encoded.put(matrices[name], held)
        for key, tensor in found[0].items():
            name, _, what = key.rpartition(":")
            if name in matrices and key not in matrices:
                self._moments.setdefault(name, {})[what] = tensor.to("cpu" if what == "step" else device, copy=True)
        self._taken, self._course.phases[:] = found[1]["taken"], [Phase(*told) for told in found[1]["phases"]]
        self._tell(self._taken)


def by_input(listed: Sequence[Matrix], seen: Sequence[tuple[str, Tensor]]) -> list[list[Matrix]]:
    """Return matrices by the tensor that each reads first, in order of use; those of none with the last.

    Parameters
    ----------
    seen : sequence of (str, Tensor)
        Matrices' names and what they read, in order of use.
    """
    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in seen:
        if any(name in names for _, names in groups):
            continue
        own = next((names for held, names in groups if held is tensor), None)
        if own is None:
            groups.append((tensor, [name]))
        else:
            own.append(name)
    named = {m.name: m for m in listed}
    found = [[named.pop(name) for name in names if name in named] for _, names in groups]
    found = [group for group in found if group]
    if named:
        found = [*found[:-1], [*(found[-1] if found else []), *named.values()]]
    return found

"""Training the parts of a compressed model against its original, by Adam, stopped early: as a rule KL of their logits.

Windows of a step are worked on by several threads, each with one thread of torch, and their gradients are added in the
order of the windows: so the same seed gives the same parts however many threads there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tersor.hf.models.flow import in_order

NATS = 0.5  # below this loss, steps shrink with its root, as the way to the best parts does
WARM = 0.05  # share of the steps in which they grow to the longest
WARM_STEPS = 3  # in which they do where they are constant afterwards
BETAS = (0.9, 0.98)
CHECKS = 8  # times that the kept-apart text is looked at
PATIENCE = 5  # looks without a better state, after which training ends
DIVERGED = 1.5  # times the first loss on the kept-apart text


Moments = dict[str, Tensor]  # what Adam keeps of a part: `step`, `exp_avg`, `exp_avg_sq`


class Pupil(Protocol):
    """What is trained: parts, and a model whose weights depend on them.

    Attributes
    ----------
    device : torch.device
    values : dict of str to Tensor
        The parts before training, float32.
    leaves : dict of str to Tensor
        The model's parameters that depend on parts.
    """

    device: torch.device
    values: dict[str, Tensor]
    leaves: dict[str, Tensor]

    def answer(self, batch: int, ids: Tensor) -> Tensor:
        """Return the logits of a batch of the text, token ids (windows, context); recorded where gradients are."""
        ...

    def install(self, values: Mapping[str, Tensor]) -> None:
        """Compute with these parts."""
        ...

    def gradients(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the parts from those of the leaves."""
        ...

    def longest(self) -> dict[str, float]:
        """Return the longest step of each part's numbers."""
        ...


class Teacher(Protocol):
    """What the original makes of batches of windows."""

    def __call__(self, batch: int) -> tuple[Tensor, bool]:
        """Return the logits of a batch, or what a block makes of it, and whether they are logits."""
        ...


class Saved(Protocol):
    """Where a run that may be killed keeps its state."""

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last."""
        ...

    def due(self) -> bool:
        """Return whether it is time to save."""
        ...

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace what was saved."""
        ...


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a training reads.

    Attributes
    ----------
    batches : sequence of Tensor
        Token ids (windows, context) of what is worked on at a time.
    apart : int
        The first so many batches are kept apart: nothing is trained on them, and they say when to stop.
    each : int
        Batches of a step.
    steps : int
    seed : int
        Of the order in which batches are read.
    begin : int
        Steps of that order that other trainings take before.
    checks : int
        Times that the kept-apart text is looked at.
    looks : int or None
        Batches of it that are looked at, evenly spaced; None: all.
    constant : bool
        Steps are as long at the end as at the beginning: what is trained is trained on.
    """

    batches: Sequence[Tensor]
    apart: int
    each: int
    steps: int
    seed: int = 0
    begin: int = 0
    checks: int = CHECKS
    looks: int | None = None
    constant: bool = False

    def order(self) -> list[list[int]]:
        """Return the batches of every step: each time through the text in another order."""
        generator = torch.Generator().manual_seed(self.seed)
        count, wanted = len(self.batches) - self.apart, self.each * (self.begin + self.steps)
        listed: list[int] = []
        while len(listed) < wanted:
            listed += [self.apart + int(place) for place in torch.randperm(count, generator=generator)]
        return [listed[step * self.each : (step + 1) * self.each] for step in range(self.begin, wanted // self.each)]


@dataclasses.dataclass(eq=False)
class Outcome:
    """What came of a training.

    Attributes
    ----------
    values : dict of str to Tensor
        The best parts.
    before, after : float
        KL on the text kept apart, in nats a token: of the parts that there were, and of the best ones.
    steps : int
        Steps until the best parts.
    taken : int
        Steps that were taken.
    history : list of (int, float)
        Steps, and KL on the text kept apart.
    """

    values: dict[str, Tensor]
    before: float = math.nan
    after: float = math.inf
    steps: int = 0
    taken: int = 0
    history: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    @property
    def going(self) -> bool:
        """Whether there is reason to go on."""
        return not self.diverged and sum(step > self.steps for step, _ in self.history) < PATIENCE

    @property
    def diverged(self) -> bool:
        """Whether the last loss was far beyond the first, or no longer finite."""
        return bool(self.history) and not self.history[-1][1] <= DIVERGED * self.before

    def note(self, step: int, loss: float, values: Mapping[str, Tensor]) -> None:
        """Take note of a loss."""
        self.history.append((step, loss))
        if len(self.history) == 1:
            self.before = loss
        if loss < self.after:
            self.after, self.steps = loss, step
            self.values = {name: value.detach().clone() for name, value in values.items()}


def distance(outputs: Tensor, original: Tensor) -> Tensor:
    """Return the sum over positions of `‖original - ours‖² / ‖original‖²` of what a block returns, (..., width)."""
    wanted = original.to(torch.float32)
    off = (outputs.to(torch.float32) - wanted).square().sum(-1)
    return (off / wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).sum()


def divergence(logits: Tensor, original: Tensor) -> Tensor:
    """Return the sum over positions of `KL(original ‖ ours)` of logits (..., vocabulary), in nats."""
    ours = torch.log_softmax(logits.to(torch.float32).flatten(0, -2), -1)
    theirs = torch.log_softmax(original.to(torch.float32).flatten(0, -2), -1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True)


class Training:
    """The loop.

    Parameters
    ----------
    student : Pupil
    teacher : Teacher
    lesson : Lesson
    saved : Saved
    tell : callable
        Called with the steps that are done.
    moments : mapping or None
        What `moments` returned after a training of the same parts, or more, that this one goes on from.
    loss : callable
        Of what the student and the teacher make of a batch: a sum over its positions.
    full : float or None
        The loss from which steps are the longest; None: `NATS`.
    """

    def __init__(self, student: Pupil, teacher: Teacher, lesson: Lesson, saved: Saved, tell: Callable[[int], None],
                 moments: Mapping[str, Moments] | None = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = divergence, full: float | None = None) -> None:
        self.student, self.teacher, self.lesson, self.saved, self._tell = student, teacher, lesson, saved, tell
        self._measure, self._full = loss, NATS if full is None else full
        self.parts = {name: value.clone().requires_grad_(True) for name, value in student.values.items()}
        longest = student.longest()
        self._longest = [longest[name] for name in self.parts]
        self._adam = torch.optim.Adam([{"params": [part], "lr": rate} for part, rate in
                                       zip(self.parts.values(), self._longest, strict=True)], betas=BETAS)
        self.outcome = Outcome(dict(student.values))
        for name, part in self.parts.items():
            if moments is not None and name in moments:
                self._adam.state[part] = dict(moments[name])

    def moments(self) -> dict[str, Moments]:
        """Return the means that Adam keeps of the gradients of each part that has made a step."""
        return {name: self._adam.state[part] for name, part in self.parts.items() if part in self._adam.state}

    def run(self) -> Outcome:
        """Train to the end, or until it no longer helps; the student is left with the best parts."""
        begin, order = self._resume(), self.lesson.order()
        every = max(1, math.ceil(len(order) / self.lesson.checks))
        if not self.outcome.history:
            self.outcome.note(0, self._apart(), self.parts)
        for step in range(begin, len(order)):
            if not self.outcome.going:
                break
            self._step(order[step], self._share(step))
            self.outcome.taken = step + 1
            if (step + 1) % every == 0 or step + 1 == len(order):
                self.outcome.note(step + 1, self._apart(), self.parts)
            if self.saved.due():
                self._save(step + 1)
            self._tell(step + 1)
        self.student.install(self.outcome.values)
        return self.outcome

    def _share(self, step: int) -> float:
        """Return the share of the longest step: it grows, then falls as a cosine does; less where less is to be won."""
        warm, haste = max(1.0, WARM * self.lesson.steps), min(1.0, math.sqrt(self.outcome.before / self._full))
        if self.lesson.constant:
            return haste * min(1.0, (self.lesson.begin + step + 1) / WARM_STEPS)
        return haste * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.lesson.steps))

    def _step(self, batches: Sequence[int], share: float) -> None:
        leaves = self.student.leaves
        count = sum(self.lesson.batches[number].numel() for number in batches)
        total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for found in in_order(len(batches), lambda at: self._gradients(batches[at]), devices=[self.student.device],
                              gradients=True):
            for name, part in zip(leaves, found, strict=True):
                total[name].add_(part, alpha=1.0 / count)
        for name, gradient in self.student.gradients(total).items():
            self.parts[name].grad = gradient
        for group, longest in zip(self._adam.param_groups, self._longest, strict=True):
            group["lr"] = longest * share
        self._adam.step()
        self.student.install({name: part.detach() for name, part in self.parts.items()})

    def _gradients(self, batch: int) -> tuple[Tensor, ...]:
        loss = self._loss(batch)
        return torch.autograd.grad(loss, list(self.student.leaves.values()), materialize_grads=True)

    def _loss(self, batch: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch)[0]
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=halves(self.student.device)):
            found = self.student.answer(batch, self.lesson.batches[batch])
        return self._measure(found, wanted)

    def _apart(self) -> float:
        """Return the mean KL a position on the text kept apart."""
        listed = range(0, self.lesson.apart, max(1, self.lesson.apart // (self.lesson.looks or self.lesson.apart)))
        total = sum(in_order(len(listed), lambda at: float(self._loss(listed[at])), devices=[self.student.device]))
        return total / sum(self.lesson.batches[at].numel() for at in listed)

    def _save(self, step: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            state = self._adam.state[part]
            tensors |= {f"now:{name}": part.detach(), f"best:{name}": self.outcome.values[name],
                        f"mean:{name}": state["exp_avg"], f"square:{name}": state["exp_avg_sq"],
                        f"steps:{name}": state["step"]}
        kept = self.outcome
        self.saved.save(tensors, {"step": step, "before": kept.before, "after": kept.after, "best": kept.steps,
                                  "history": kept.history})

    def _resume(self) -> int:
        """Take up what a killed run has saved; return the step to go on with."""
        found = self.saved.read()
        if found is None:
            return 0
        tensors, record = found
        kept = self.outcome
        for name, part in self.parts.items():
            part.data.copy_(tensors[f"now:{name}"])
            kept.values[name] = tensors[f"best:{name}"].to(part.device, copy=True)
            mean, square = (tensors[f"{kind}:{name}"].to(part.device, copy=True) for kind in ("mean", "square"))
            self._adam.state[part] = {"step": tensors[f"steps:{name}"].to("cpu", copy=True), "exp_avg": mean,
                                      "exp_avg_sq": square}
        kept.before, kept.after, kept.steps, kept.taken = (record["before"], record["after"], record["best"],
                                                           record["step"])
        kept.history = [(int(step), float(loss)) for step, loss in record["history"]]
        self.student.install({name: part.detach() for name, part in self.parts.items()})
        return int(record["step"])


def halves(device: torch.device) -> bool:
    """Tell whether products are of 16 bits: those that a GPU, or what torch says of the processor, has units for."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

"""Text run through a model one block at a time, with the weights of one block in memory; no list of architectures.

Blocks are the members of module lists, in the order in which the model calls them. For each block, the model's own code
runs anew: blocks before it return what they returned when they were resident, so that masks, angles and whatever else
a block is given is made by the model itself. The last stage is the rest of the model, after all blocks.

That a model may be run so is proven once, on a few tokens: what a block computes in a run from end to end must be what
it computes when it is run alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tersor.errors import ModelError
from tersor.hf.models.classes import feed, run
from tersor.hf.models.hollow import Hollow
from tersor.hf.models.matrices import FOREIGN, Matrix, Parts

PILOT = 16  # tokens that the proof runs on
CLOSE = 1e-4  # relative distance of two runs of the same code on the same numbers
HINT = "give --whole-model to work on all blocks at once, if it fits the memory"

Leaves = tuple[Tensor, ...]
Given = Mapping[str, Leaves]


class _Enough(Exception):
    pass


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A member of a module list.

    Attributes
    ----------
    name : str
        Of the module.
    list : str
        Of the module list.
    module : nn.Module
    """

    name: str
    list: str
    module: nn.Module

    def holds(self, parameter: str) -> bool:
        """Return whether a parameter lies inside."""
        return parameter.startswith(f"{self.name}.")


@dataclasses.dataclass(eq=False)
class _Run:
    """One run of the model's code up to a stage, in one thread.

    Attributes
    ----------
    stage : int or None
        The block that computes; None: all do, each proven in passing.
    given : mapping of str to tuple of Tensor
        What the last block before the stage returned, by list.
    onward : bool
        Whether all blocks from the stage on compute, to the model's end.
    left : set of str or None
        Watched matrices whose inputs are still to come, after which the run may end; None: it goes to the stage's end.
    """

    stage: int | None
    given: Given
    onward: bool = False
    left: set[str] | None = None
    out: Leaves = ()
    seen: list[tuple[str, Tensor]] = dataclasses.field(default_factory=list)

    def see(self, name: str, given: Tensor) -> None:
        """Take note of what a matrix multiplies.

        Raises
        ------
        _Enough
            If nothing is left to be seen.
        """
        self.seen.append((name, given))
        if self.left is not None:
            self.left.discard(name)
            if not self.left:
                raise _Enough


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found when a model was proven to run block by block.

    Attributes
    ----------
    order : tuple of str
        Names of the blocks, as they are used.
    forms : mapping of str to tuple of bool or None
        Which parts of what the blocks of a list return are tensors; None: it is one tensor.
    last : str or None
        The last matrix whose inputs the last stage makes.
    """

    order: tuple[str, ...]
    forms: Mapping[str, tuple[bool, ...] | None]
    last: str | None


class Streamed:
    """A model, and the stages in which text is run through it: its blocks, then the rest.

    Parameters
    ----------
    hollow : Hollow
    ids : Tensor
        Token ids (1, length) that the proof runs on, a few of them.
    whole : bool
        Keep all weights in memory; then there is one stage, the model.

    Attributes
    ----------
    blocks : list of Block
        In the order of use.
    copies : list of Streamed
        This one, and those of the same model on other devices, which `resident` and `watched` mean as well.
    reads : mapping of str to nn.Module
        The module whose input a matrix multiplies, by the matrix's name; those of the head for an embedding tied to it.

    Raises
    ------
    ModelError
        If the model cannot be run block by block; says why.
    """

    def __init__(self, hollow: Hollow, ids: Tensor, *, whole: bool = False) -> None:
        self.hollow, self.model = hollow, hollow.model
        self.copies = [self]
        self.blocks: list[Block] = []
        self.reads = _reads(hollow)
        self._places: dict[str, int] = {}
        self._local = threading.local()
        self._lists: dict[str, tuple[bool, ...] | None] = {}  # which parts of an output are tensors; None: it is one
        self._last: nn.Module | None = None  # after what it reads, the last stage has nothing more to watch
        found = [] if whole else list(candidates(self.model, hollow.source.layout))
        _check_ties(hollow, found)
        inside = {id(part) for block in found for part in block.module.modules()}
        hollow.fill(part for part in self.model.modules() if id(part) not in inside)
        for block in found:
            block.module.__dict__["forward"] = self._forward(block)
        if found and hollow.source.proofs:  # for which all weights were read
            self._believe(hollow.source.proofs[0], {block.name: block for block in found})
        elif found:
            hollow.source.proofs.append(self._prove(ids[:1, :PILOT]))
        elif not whole:
            raise ModelError(f"no sequence of blocks with matrices was found in a {type(self.model).__name__}; {HINT}")

    def _believe(self, proof: Proof, named: Mapping[str, Block]) -> None:
        self.blocks = [named[name] for name in proof.order]
        self._places, self._lists = {name: place for place, name in enumerate(proof.order)}, dict(proof.forms)
        self._last = None if proof.last is None else self.reads[proof.last]

    def matrices(self, stage: int) -> list[Matrix]:
        """Return the matrices of a stage; the last one's are those outside of all blocks."""
        listed = self.hollow.source.layout.matrices.values()
        if stage < len(self.blocks):
            return [m for m in listed if self.blocks[stage].holds(m.parameter)]
        return [m for m in listed if not any(block.holds(m.parameter) for block in self.blocks)]

    def at(self, batch: int) -> Streamed:
        """Return the copy that works on a batch: all in turn."""
        return self.copies[batch % len(self.copies)]

    @property
    def devices(self) -> list[torch.device]:
        """The copies' devices."""
        return [copy.hollow.device for copy in self.copies]

    @torch.no_grad()
    def put(self, matrix: Matrix, value: Tensor) -> None:
        """Let all copies compute with a matrix (out, in) that they hold."""
        for copy in self.copies:
            matrix.take(copy.hollow.parameter(matrix.parameter)).copy_(value)

    def looks_up(self, matrix: Matrix) -> bool:
        """Return whether a matrix is a table that tokens are looked up in, whatever else it is."""
        return isinstance(self.model.get_submodule(matrix.parameter.rpartition(".")[0]), nn.Embedding)

    @contextlib.contextmanager
    def resident(self, stage: int) -> Iterator[None]:
        """Hold the weights of a stage's block in memory."""
        try:
            for copy in self.copies:  # others take them from the first
                copy.hollow.fill(copy._modules(stage))
            yield
        finally:
            for copy in self.copies:
                copy.hollow.empty(copy._modules(stage))

    def _modules(self, stage: int) -> list[nn.Module]:
        return list(self.blocks[stage].module.modules()) if stage < len(self.blocks) else []

    @contextlib.contextmanager
    def watched(self, stage: int) -> Iterator[None]:
        """Let `step` return what a stage's matrices multiply."""
        handles = [handle for copy in self.copies for handle in copy._watch(stage)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watchable(self, stage: int) -> set[str]:
        """Return the matrices of a stage whose inputs can be watched."""
        return {m.name for m in self.matrices(stage) if m.name in self.reads}

    def _watch(self, stage: int) -> list[RemovableHandle]:
        modules = [(m.name, self.reads[m.name]) for m in self.matrices(stage) if m.name in self.reads]
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules]
        if stage == len(self.blocks) and self._last is not None:
            handles.append(self._last.register_forward_pre_hook(_stop))
        return handles

    def step(self, stage: int, ids: Tensor, given: Given,
             until: Collection[str] | None = None) -> tuple[Leaves, list[tuple[str, Tensor]]]:
        """Run token ids (batch, length) through a block that is resident, or as far through the rest as is watched.

        Parameters
        ----------
        given : mapping of str to tuple of Tensor
            What the last block before the stage returned, by list.
        until : collection of str or None
            Matrices after whose inputs the run may end: the block then returns nothing.

        Returns
        -------
        (tuple of Tensor, list of (str, Tensor))
            What the block returned, and what watched matrices multiply, in order of use.
        """
        now = self._go(_Run(stage, given, left=set(until) if until else None), ids, lambda inputs: self.model(**inputs))
        return now.out, now.seen

    def finish(self, ids: Tensor, given: Given, stage: int | None = None) -> tuple[Tensor, bool]:
        """Run a stage and all after it, which are resident; return the model's main output, and whether that is logits.

        Parameters
        ----------
        stage : int or None
            None: the last.
        """
        found: list[tuple[Tensor, bool]] = []
        self._go(_Run(len(self.blocks) if stage is None else stage, given, onward=True), ids,
                 lambda inputs: found.append(run(self.model, inputs)))
        return found[0]

    def _go(self, now: _Run, ids: Tensor, call: Callable[[dict[str, Any]], Any]) -> _Run:
        before = self._local.__dict__.get("now")
        self._local.now = now
        try:
            with contextlib.suppress(_Enough):
                call(feed(self.model, ids.to(self.hollow.device)))
        finally:
            self._local.now = before
        return now

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            del module
            if inputs[0].is_floating_point():  # token ids are looked up
                self._local.now.see(name, inputs[0])
        return hook

    def _forward(self, block: Block) -> Callable[..., Any]:
        """Return what stands in for a block's own code."""
        own = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            now: _Run = self._local.now
            if now.stage is None:
                return self._prove_block(block, lambda: own(*args, **kwargs))
            if self._places[block.name] < now.stage:
                return self._packed(block.list, now.given[block.list])
            if now.onward:
                return own(*args, **kwargs)
            now.out = self._unpacked(block, own(*args, **kwargs))
            raise _Enough
        return forward

    def _packed(self, name: str, leaves: Leaves) -> Any:
        form, rest = self._lists[name], iter(leaves)
        return leaves[0] if form is None else tuple(next(rest) if tensor else None for tensor in form)

    def _unpacked(self, block: Block, given: Any) -> Leaves:
        parts = given if isinstance(given, (tuple, list)) else (given,)
        odd = next((part for part in parts if part is not None and not isinstance(part, Tensor)), None)
        form = None if isinstance(given, Tensor) else tuple(part is not None for part in parts)
        if odd is not None or self._lists.setdefault(block.list, form) != form:
            what = f"a {type(odd).__name__}" if odd is not None else "another form of output than the block before"
            raise ModelError(f"block '{block.name}' returns {what}, so it cannot be run alone; {HINT}")
        return tuple(part for part in parts if part is not None)

    @torch.no_grad()
    def _prove(self, ids: Tensor) -> Proof:
        """Run a few tokens from end to end, and find that each stage computes the same when it is run alone."""
        kind = type(self.model).__name__
        self._pilot, self._chain = ids, dict[str, Leaves]()
        self._local.now = _Run(None, {})
        try:
            expected = run(self.model, feed(self.model, ids.to(self.hollow.device)))[0]
            if not self.blocks:
                raise ModelError(f"text passes none of the blocks of a {kind}; {HINT}")
            last = len(self.blocks)
            with self.watched(last):
                used = self.step(last, ids, self._chain)[1]
            self._last = self.reads[used[-1][0]] if used else None
            self._check("what follows the blocks", (expected,), (self.finish(ids, self._chain)[0],))
            return Proof(tuple(self._places), dict(self._lists), used[-1][0] if used else None)
        except FOREIGN as error:
            raise ModelError(f"a {kind} cannot be run block by block: {type(error).__name__}: "
                             f"{' '.join(str(error).split())[:200]}; {HINT}") from error
        finally:
            self._local.now, self._chain = None, {}

    def _prove_block(self, block: Block, own: Callable[[], Any]) -> Any:
        if block.name in self._places:
            raise ModelError(f"the model runs '{block.name}' more than once, so it cannot be run block by block; "
                             f"{HINT}")
        stage = self._places[block.name] = len(self.blocks)
        self.blocks.append(block)
        with self.resident(stage):
            given = own()
            leaves = self._unpacked(block, given)
            self._check(f"block '{block.name}'", leaves, self.step(stage, self._pilot, dict(self._chain))[0])
        self._chain[block.list] = leaves
        return given

    def _check(self, what: str, expected: Leaves, found: Leaves) -> None:
        if len(expected) != len(found) or not all(map(_alike, expected, found)):
            raise ModelError(f"{what} computes something else when it is run alone, so this model cannot be run block "
                             f"by block; {HINT}")


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    del module, inputs
    raise _Enough


def _alike(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    size, off = expected.to(torch.float64).norm(), (expected.to(torch.float64) - found.to(torch.float64)).norm()
    return torch.equal(expected, found) or bool(off <= CLOSE * size)


def candidates(model: nn.Module, layout: Parts) -> Iterator[Block]:
    """Yield the members of outermost module lists that hold a matrix of the layout."""
    parameters = {m.parameter for m in layout.matrices.values()}
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            for number, member in enumerate(module):
                block = Block(f"{name}.{number}", name, member)
                if any(block.holds(parameter) for parameter in parameters):
                    yield block


def _check_ties(hollow: Hollow, blocks: list[Block]) -> None:
    """Raise `ModelError` if a block shares a parameter with another, or with what lies outside."""
    places = [block.name for block in blocks]
    for target, origin in hollow.source.layout.tied.items():
        homes = [next((place for place in places if name.startswith(f"{place}.")), None) for name in (target, origin)]
        if homes[0] != homes[1]:
            raise ModelError(f"'{target}' is tied to '{origin}', in another block, so this model cannot be run block "
                             f"by block; {HINT}")


def _reads(hollow: Hollow) -> dict[str, nn.Module]:
    layout = hollow.source.layout
    heads = {origin: target for target, origin in layout.tied.items()}
    found: dict[str, nn.Module] = {}
    for matrix in layout.matrices.values():
        name = matrix.parameter if matrix.kind in ("linear", "conv1d") else heads.get(matrix.parameter, "")
        if name and matrix.kind != "stack":
            found[matrix.name] = hollow.model.get_submodule(name.rpartition(".")[0])
    return found

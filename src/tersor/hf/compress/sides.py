"""How errors of a matrix's rows add up: second moments of the loss's gradients by its outputs, from the Fisher pass.

They are gathered where the pass goes back through a block, and put down in a file a block: matrices are encoded in the
other direction, and most models have more of them than memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import CorruptStoreError
from tersor.files import load_sealed, save_sealed, tell_damaged
from tersor.hf.compress.sensitivity import Fisher
from tersor.hf.models.streamed import Streamed
from tersor.numerics.sides import Blocks, parted

TOKENS = 1 << 15  # of the text that moments are made from; from 4,096 they do harm (docs/log.md)


class SidedFisher(Fisher):
    """The pass, which also gathers the moments of gradients by outputs.

    Parameters
    ----------
    files : callable
        A stage to the file of its moments.
    """

    def __init__(self, streamed: Streamed, sequences: Tensor, seed: int, folder: Path | None, *,
                 files: Callable[[int], Path], mark: str) -> None:
        super().__init__(streamed, sequences, seed, folder)
        self._files, self._mark, self._here = files, mark, threading.local()
        self._found: dict[int, dict[str, Blocks]] = {}  # by sequence
        self._total: dict[str, Blocks] = {}  # of a stage

    def _backward(self, stage: int) -> None:
        handles = [copy.hollow.model.get_submodule(m.parameter.removesuffix(".weight")).register_forward_hook(
            self._hook(m.name)) for copy in self.streamed.copies for m in self.streamed.matrices(stage)
            if m.kind == "linear"]
        self._total = {}
        try:
            super()._backward(stage)
        finally:
            for handle in handles:
                handle.remove()
        count, record = self.sequences.numel(), {"job": self._mark, "files": self._last + 1}
        save_sealed({f"{name}/{place}": block / count for name, blocks in self._total.items()
                     for place, block in enumerate(blocks)}, self._files(stage), record)

    def _one(self, stage: int, number: int, wanted: Mapping[str, nn.Parameter]) -> Any:
        self._here.found = self._found[number] = {}
        return super()._one(stage, number, wanted)

    def _take(self, number: int, found: Any, block_list: str | None) -> None:
        super()._take(number, found, block_list)
        for name, blocks in self._found.pop(number).items():  # in the order of the sequences
            before = self._total.get(name)
            self._total[name] = blocks if before is None else [old + new for old, new in zip(before, blocks,
                                                                                            strict=True)]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def gather(found: dict[str, Blocks], gradient: Tensor) -> None:
            rows = gradient.detach().to(torch.float32).reshape(-1, gradient.shape[-1])
            blocks = [part.T @ part for part in rows.split(parted(rows.shape[1]), 1)]
            before = found.get(name)
            found[name] = blocks if before is None else [old + new for old, new in zip(before, blocks, strict=True)]

        def hook(module: nn.Module, given: Any, output: Any) -> None:
            del module, given
            if isinstance(output, Tensor) and output.requires_grad:
                here = self._here.found
                output.register_hook(lambda gradient: gather(here, gradient))
        return hook


class Sides:
    """The moments in a folder, by matrix; the file read last is kept.

    Parameters
    ----------
    files : mapping of str to Path
        The file of each matrix.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._held: tuple[Path, Mapping[str, Tensor]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that there are moments of."""
        return tuple(self._files)

    def of(self, name: str, device: torch.device) -> Blocks | None:
        """Return the blocks of a matrix, if there are any."""
        file = self._files.get(name)
        if file is None:
            return None
        if self._held is None or self._held[0] != file:
            self._held = file, load_sealed(file)[0]
        tensors = self._held[1]
        count = sum(key.rpartition("/")[0] == name for key in tensors)
        return [tensors[f"{name}/{place}"].to(device) for place in range(count)]


def gathering(folder: Path, mark: str) -> Callable[[Streamed, Tensor, int, Path | None], Fisher]:
    """Return what makes a pass that puts its moments down in a folder."""
    folder.mkdir(parents=True, exist_ok=True)

    def fisher(streamed: Streamed, sequences: Tensor, seed: int, room: Path | None) -> Fisher:
        return SidedFisher(streamed, sequences, seed, room, files=lambda stage: folder / f"{stage:06d}.safetensors",
                           mark=mark)
    return fisher


def read(folder: Path, mark: str) -> Sides | None:
    """Return what a pass has put down; None if one of the files is damaged, missing, or another job's."""
    found: dict[str, Path] = {}
    files, expected = sorted(folder.glob("*.safetensors")), 1
    for file in files:
        try:
            tensors, record = load_sealed(file)
        except CorruptStoreError as error:
            tell_damaged(error)
            return None
        if record.get("job") != mark:
            return None
        expected = record["files"]
        found |= {key.rpartition("/")[0]: file for key in tensors}
    return Sides(found) if len(files) == expected else None

"""What a run needs: memory, stage by stage, and room on the disk, from shapes alone."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from tersor.errors import ModelError
from tersor.figures import size_text
from tersor.hf.compress.reading import BATCH_TOKENS
from tersor.hf.compress.request import Sampling
from tersor.hf.models.evaluate import LOGITS
from tersor.hf.models.flow import HELD
from tersor.hf.models.hollow import dtype_on
from tersor.hf.models.matrices import Matrix, empty_model
from tersor.hf.models.source import Source
from tersor.hf.models.streamed import candidates
from tersor.numerics.settings import threads_allowed

DOUBLE = 8  # bytes of the numbers in which a Hessian is factored
COPIES = 6  # float32 copies of a matrix that an encoder with feedback holds at once, about; measured
LOGITS_HELD = 16  # bytes of a logit in an evaluation: of both models, twice while they are made; measured
PROCESS = 1 << 29  # bytes of a process that has imported what it needs
BESIDE = 3  # times the room of two stages at once that must be free
WIDE = 3  # activations as wide as the widest matrix that a block holds at once, and of its own width, about


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What of a model's shapes decides what it needs.

    Attributes
    ----------
    blocks : int
        0: the whole model at once.
    block, outside : int
        Elements of the largest block, and of all that lies outside of blocks.
    width, widest : int
        Of what blocks hand on, and of the widest that a block makes.
    moments : int
        Elements of the moments of a block.
    largest, widest_input : int
        Elements of the largest matrix, and the inputs of the matrix with the most of them.
    vocabulary : int
        Rows of the matrix outside of the blocks that has the most.
    number : int
        Bytes of a number that the model computes with.
    """

    blocks: int
    block: int
    outside: int
    width: int
    widest: int
    moments: int
    largest: int
    widest_input: int
    vocabulary: int
    number: int

    @classmethod
    def of(cls, source: Source, device: str, *, whole: bool = False) -> Shapes:
        """Return the shapes of a source."""
        listed = list(source.layout.matrices.values())
        blocks = [] if whole else list(candidates(empty_model(source.config), source.layout))
        parts = [[m for m in listed if block.holds(m.parameter)] for block in blocks]
        inner = {m.name for part in parts for m in part}
        outside = [m for m in listed if m.name not in inner]
        worked = parts or [outside]
        widths = [m.shape[1] for part in worked for m in part]
        return cls(len(blocks), max(map(_elements, worked)), _elements(outside), min(widths),
                   max(max(m.shape) for part in worked for m in part), max(map(_moments, worked)),
                   max(m.shape[0] * m.shape[1] for m in listed), max(widths), max((m.shape[0] for m in outside),
                                                                                  default=1),
                   dtype_on(source, device).itemsize)


def _elements(matrices: Sequence[Matrix]) -> int:
    return sum(m.shape[0] * m.shape[1] for m in matrices)


def _moments(matrices: Sequence[Matrix]) -> int:
    """Return the elements of a block's moments: matrices of one name's end and input read one tensor, about."""
    widths = [m.shape[1] for m in matrices if m.kind != "embedding"]
    narrow = min(widths, default=0)
    return sum(width * width for width in set(widths)) + 2 * narrow * narrow


def memory_by_stage(shapes: Shapes, sampling: Sampling, evaluation_tokens: int, context: int, *, calibrated: bool,
                    workers: int, copies: int = 1) -> dict[str, int]:
    """Return the bytes that each stage holds at once, besides the interpreter: of the device, where it is a GPU.

    Parameters
    ----------
    copies : int
        Of the model, one a device: in one memory, if that is a processor's.
    """
    batch = min(BATCH_TOKENS, sampling.tokens)
    workers = max(1, min(workers, sampling.tokens // max(1, batch)))
    held = min(HELD, sampling.tokens * shapes.width * shapes.number)
    moving = WIDE * batch * (shapes.width + shapes.widest) * shapes.number
    rest, block, moments = shapes.outside * shapes.number, shapes.block * shapes.number, 4 * shapes.moments
    encoder = 4 * COPIES * shapes.largest + (2 * DOUBLE + 8) * shapes.widest_input**2 * calibrated
    if not calibrated:
        found = {"survey": 4 * shapes.largest * 2, "encode": 4 * COPIES * shapes.largest}
    else:
        logits = min(sampling.context, sampling.fisher_context) * shapes.vocabulary
        entered = min(HELD, sampling.fisher_tokens * shapes.width * shapes.number * max(1, shapes.blocks))
        found = {"calibrate": rest + entered + max(2 * rest + 24 * logits, workers * 2 * block + moving),
                 "survey": rest + block + held + moments + workers * (moving + moments),
                 "encode": 2 * (rest + block + held + moments) + max(workers * (2 * moving + 2 * moments), encoder)}
    if evaluation_tokens:
        found["evaluate"] = _evaluation(shapes, evaluation_tokens, context)
    for stage, times in (("calibrate", 1), ("survey", 1), ("encode", 2)) if shapes.number == 4 and calibrated else ():
        found[stage] += (copies - 1) * times * (rest + block)
    return found | {"verify": _verification(shapes)}


def _evaluation(shapes: Shapes, tokens: int, context: int) -> int:
    held = max(context, min(4096, tokens, LOGITS // shapes.vocabulary))
    decoded = (shapes.outside + shapes.block * shapes.blocks) // 2
    return (shapes.outside + shapes.block) * shapes.number + decoded + LOGITS_HELD * held * shapes.vocabulary


def _verification(shapes: Shapes) -> int:
    return 4 * COPIES * shapes.largest


def room_beside(shapes: Shapes, device: str, evaluation_tokens: int, context: int) -> bool:
    """Return whether a verification can run beside an evaluation.

    The device's memory must have room for both several times over, and a processor two threads.
    """
    if not evaluation_tokens or (torch.device(device).type == "cpu" and threads_allowed() == 1):
        return False
    free = free_memory(device)
    needed = _evaluation(shapes, evaluation_tokens, context) + _verification(shapes) + PROCESS
    return free is not None and BESIDE * needed <= free


def disk(shapes: Shapes, budget: int, sampling: Sampling, *, calibrated: bool) -> int:
    """Return the bytes that the work folder and the output take at most.

    Matrices lie there by themselves and in the output. What two flows of text carry is saved, the old saving beside the
    new one, and lies in files where it finds no room in memory.
    """
    carried = sampling.tokens * shapes.width * shapes.number
    return 2 * budget + (4 * carried + 2 * max(0, carried - HELD) if calibrated else 0)


def check_disk(folder: Path, needed: int) -> None:
    """Raise `OSError` unless there is room for what a run writes, besides what it has written already.

    Parameters
    ----------
    folder : Path
        The work folder; where it is not there yet, the nearest folder above it is asked.
    """
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(place).free + written
    if free < needed:
        raise OSError(errno.ENOSPC, f"the work folder takes up to {size_text(needed)}, but {size_text(free)} are free "
                                    "there; make room, or name an output elsewhere", str(folder))


def free_memory(device: str) -> int | None:
    """Return the bytes that a device has for this process; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    line = next((line for line in file.read_text().splitlines() if line.startswith("MemAvailable")), None)
    return None if line is None else int(line.split()[1]) * 1024


def check_memory(shapes: Shapes, devices: Sequence[str]) -> None:
    """Raise `ModelError` if a block, with what lies outside of all blocks, finds no room on one of the devices."""
    once = (shapes.outside + shapes.block) * shapes.number
    for device in dict.fromkeys(devices):
        least, free = once * list(devices).count(device), free_memory(device)
        if free is not None and least > free:
            what = "the largest block, and what lies outside of blocks, take" if shapes.blocks else "the model takes"
            raise ModelError(f"{what} {size_text(least)}, but {device} has {size_text(free)} free; use a larger "
                             "device, or another one")

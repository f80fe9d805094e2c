"""Lets quanto unpack without its CUDA extension, which would take minutes to build."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.suites.gpu.timing import device
from bench.worker import SetupError, SkipError


def prepare() -> dict[str, Any]:
    """Let quanto unpack without its CUDA extension, which would take minutes to build; return by what it unpacks.

    That is its own kernels, compiled here alone, where they agree with its plain torch, else the plain torch.
    """
    try:
        import optimum.quanto
        from optimum.quanto.library.extensions.extension import get_extension, is_extension_available
    except ImportError as error:
        raise SkipError(f"quanto cannot be imported: {error}; PYTHONPATH=src:dev/quanto") from error
    if not is_extension_available("quanto_cuda"):
        return {"unpack": "torch"}
    extension = get_extension("quanto_cuda")
    if extension._lib is None:
        folder = Path(optimum.quanto.__file__).parent / "library" / "extensions" / "cuda"
        extension._lib = SimpleNamespace(unpack=_unpacking((folder / "unpack.cu").read_text()))
    return {"unpack": "torch" if extension._lib.unpack is _plain_unpack else "quanto's kernel"}


def _plain_unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack as `quanto::unpack` does by default; on a GPU torch's dispatcher takes the missing extension instead."""
    return torch.cat([(packed & (2 ** (bits * (i + 1)) - 1)) >> bits * i for i in range(8 // bits)])


def _unpacking(source: str) -> Callable[[Tensor, int], Tensor]:
    """Return a function with quanto's kernels, or the plain one where they do not compile or differ."""
    try:
        kernels = {}
        for bits in (2, 4):
            name = f"unpack_{bits}bit_kernel"
            body = re.search(rf"__global__ void {name}.*?\n}}", source, re.DOTALL)
            if body is None:
                raise SetupError(f"no {name} in quanto's source")
            kernels[bits] = torch.cuda._compile_kernel(f'extern "C" {body[0]}', name)

        def unpack(packed: Tensor, bits: int) -> Tensor:
            packed = packed.contiguous()
            out = packed.new_empty((packed.shape[0] * (8 // bits), *packed.shape[1:]))
            count = packed.numel()
            kernels[bits](grid=(-(-count // 256), 1, 1), block=(256, 1, 1), args=[packed, out, count])
            return out

        sample = torch.randint(0, 256, (300, 7), dtype=torch.uint8, device=device())
        if all(torch.equal(unpack(sample, bits), _plain_unpack(sample, bits)) for bits in (2, 4)):
            return unpack
        print("    quanto's kernels, compiled alone, differ; plain torch is taken", flush=True)
    except (RuntimeError, AttributeError, TypeError, ValueError, ImportError, OSError, SetupError) as error:
        print(f"    quanto's kernels do not compile alone: {str(error)[:300]}; plain torch is taken", flush=True)
    return _plain_unpack

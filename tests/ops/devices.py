"""The devices that ops are tested on, and the mark of tests that need a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def GPU(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                                    reason="no CUDA device")])]

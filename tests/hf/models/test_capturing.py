"""Steps that wait for the device are not captured, and captures that fail leave a thread's stream as it was."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.hf.models import capturing, looping, stepping
from tersor.hf.models.capturing import capture
from tersor.hf.models.choosing import Texts
from tersor.hf.models.stepping import DeclinedError
from tests.hf.models.test_looping import IDS, both, dense_of
from tests.hf.replayed import Replayed


def test_a_step_that_waits_is_not_captured(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of each wait in the mode that is set meanwhile; other warnings are shown as ever."""
    modes, original, waits = [0], Texts.choose, [True]

    def chosen(self: Texts, logits: Tensor, *others: Any) -> None:
        original(self, logits, *others)
        if modes[-1] and waits[0]:
            warnings.warn(capturing.WAITS, stacklevel=1)

    def mode(asked: str | int) -> None:
        modes.append({"warn": 1}.get(asked, 0) if isinstance(asked, str) else asked)
        if modes[-1]:
            warnings.warn(f"{capturing.PROTOTYPE} feature", stacklevel=1)

    dense: Any = dense_of("llama", tmp_path)
    stepping.told.cache_clear()
    caplog.set_level(logging.INFO, logger="tersor.hf")
    for where in (looping, capturing):
        monkeypatch.setattr(where, "DEVICES", {"cpu"})
    monkeypatch.setattr(looping, "compiled", lambda model: model.__call__)
    monkeypatch.setattr(capturing, "capture", Replayed)
    monkeypatch.setattr(PreTrainedModel, "_valid_auto_compile_criteria", lambda *_: True, raising=False)
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", lambda self, config: self.__call__)
    monkeypatch.setattr(Texts, "choose", chosen)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    assert torch.equal(*both(dense, IDS))
    assert ["a step waits for the device at" in line for line in caplog.messages] == [True]
    assert modes == [0, 1, 0]
    dense.generate._loop, waits[0] = looping.Loop(), False
    assert torch.equal(*both(dense, IDS))
    assert dense.generate._loop._decoding._graphs
    assert modes == [0, 1, 0, 1, 0]
    with capturing.waiting() as found:
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)
        thread = threading.Thread(target=lambda: warnings.warn(capturing.WAITS, stacklevel=1))
        thread.start()
        thread.join()
    assert found == []


@pytest.mark.parametrize("fails", [False, True])
def test_captures_are_on_a_stream_of_their_own(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one fails torch leaves the thread on it."""
    streams, done = ["before"], list[str]()

    @contextlib.contextmanager
    def graph(held: str, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert (held, capture_error_mode) == ("graph", "thread_local")
        streams.append(stream)
        yield
        if fails:
            raise RuntimeError("operation failed\n due to a previous error during capture")
        streams.append("before")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    if fails:
        with pytest.raises(DeclinedError, match="not captured: operation failed due to"):
            capture(lambda: done.append("step"), torch.device("cpu"))
    else:
        assert capture(lambda: done.append("step"), torch.device("cpu")) == "graph"
    assert done == ["step"]
    assert streams == ["before", "side", "before"]

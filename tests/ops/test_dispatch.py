"""Which implementation ops take."""

import contextvars
import logging

import pytest
import torch

from tersor.ops import dispatch, reference_only
from tersor.ops.dispatch import kernels_allowed, log_once, take_reference


def test_reference_only_holds_within_its_block() -> None:
    assert kernels_allowed()
    with reference_only():
        assert not kernels_allowed()
        with reference_only():
            assert not kernels_allowed()
        assert not kernels_allowed()
    assert kernels_allowed()


def test_reference_only_ends_with_an_error_and_stays_in_its_context() -> None:
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert kernels_allowed()
    with reference_only():
        assert contextvars.Context().run(kernels_allowed)


def test_a_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="tersor.ops"):
        assert take_reference("hadamard", "width 11")
        assert take_reference("hadamard", "width 11")
        assert take_reference("hadamard", "width 13")
    assert [record.getMessage() for record in caplog.records] == [
        "hadamard runs as plain torch: width 11", "hadamard runs as plain torch: width 13"]


def test_kernels_run_where_nothing_speaks_against_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert not take_reference("hadamard", None)
        with reference_only():
            assert take_reference("hadamard", None)
    assert not caplog.records


def test_old_devices_take_the_reference_and_say_so(monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index else (8, 6))
    dispatch.too_old.cache_clear()
    with caplog.at_level(logging.INFO, logger="tersor.ops"):
        assert dispatch.take_reference("an op", None, torch.device("cuda", 0))
        assert not dispatch.take_reference("an op", None, torch.device("cuda", 1))
        assert not dispatch.take_reference("an op", None)
    dispatch.too_old.cache_clear()
    assert "need compute capability 9.0, found 8.6" in caplog.text

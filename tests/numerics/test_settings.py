"""What steers results is held while matrices are encoded, whoever sets what, and is afterwards as it was found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import tersor
from tersor.errors import UnsteadyError
from tersor.numerics import settings
from tersor.numerics.settings import pinned, steadily
from tersor.store.manifest import digest
from tersor.testing import gaussian

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    MATMUL.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def elsewhere(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a new thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_are_restored() -> None:
    torch.set_num_threads(2)
    with pinned():
        assert torch.get_num_threads() == 1
        with pinned(threads=False), pinned():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), pinned():
        raise KeyError
    assert torch.get_num_threads() == 2


def test_threads_of_others_are_left_alone() -> None:
    """Those that start while another is inside, those inside at the same time, and those to come."""
    torch.set_num_threads(3)
    inside, leave = threading.Barrier(3), threading.Barrier(3)

    def stay() -> tuple[int, int]:
        with pinned():
            inside.wait(20)
            found = torch.get_num_threads()
            leave.wait(20)
        return found, torch.get_num_threads()

    found: list[tuple[int, int]] = []
    overlapping = [threading.Thread(target=lambda: found.append(stay())) for _ in range(2)]
    for thread in overlapping:
        thread.start()
    inside.wait(20)
    assert elsewhere(torch.get_num_threads) == 3
    leave.wait(20)
    for thread in overlapping:
        thread.join()
    assert found == [(1, 3), (1, 3)]
    assert elsewhere(torch.get_num_threads) == torch.get_num_threads() == 3


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_precision_is_held_and_restored(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = MATMUL.fp32_precision
    with pinned():
        assert torch.get_float32_matmul_precision() == "highest"
        assert elsewhere(torch.get_float32_matmul_precision) == "highest"
    assert torch.get_float32_matmul_precision() == precision
    assert MATMUL.fp32_precision == before


def test_precision_by_both_of_torchs_names() -> None:
    """Once both were used torch refuses to tell the older one."""
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "bf16"
    with pinned():
        assert MATMUL.fp32_precision in settings.FULL
    assert MATMUL.fp32_precision == "bf16"
    assert torch.backends.cuda.matmul.fp32_precision in settings.FULL


def test_sums_in_half_precision_on_cuda_are_held() -> None:
    cuda = torch.backends.cuda.matmul
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        with pinned():
            assert cuda.allow_bf16_reduced_precision_reduction
        assert not cuda.allow_bf16_reduced_precision_reduction
    finally:
        cuda.allow_bf16_reduced_precision_reduction = True


def test_what_another_thread_sets_meanwhile_is_noticed_and_kept() -> None:
    attempts: list[str] = []

    def work(times: int) -> int:
        attempts.append(torch.get_float32_matmul_precision())
        if len(attempts) <= times:
            elsewhere(lambda: torch.set_float32_matmul_precision("medium"))
        return len(attempts)

    assert steadily(lambda: work(1)) == 2
    assert attempts == ["highest", "highest"]
    assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(UnsteadyError, match="another thread"):
        steadily(lambda: work(99))
    with pytest.raises(UnsteadyError, match="another thread"), pinned():
        elsewhere(lambda: torch.set_float32_matmul_precision("high"))
    assert torch.get_float32_matmul_precision() == "high"
    with pinned(), pinned():  # and one that sets them before the other enters
        assert torch.get_float32_matmul_precision() == "highest"


def test_modes_of_this_thread_are_held() -> None:
    tiny = torch.tensor([1e-40])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with pinned():
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert torch.empty(1).device.type == "cpu"
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).device.type == "meta"
    with pinned(gradients=True):
        assert torch.is_grad_enabled()
    if torch.set_flush_denormal(True):
        try:
            with pinned():
                assert bool(((tiny * 1) > 0).all())
            assert not bool(((tiny * 1) > 0).any())
        finally:
            torch.set_flush_denormal(False)


HOSTILE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode, "gradients": torch.enable_grad, "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16), "deterministic": lambda: deterministic()}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("codec", ["lr8(mm8;mm8)", "rot,lm3", "pq4x16t", "std,sym16"])
def test_hostile_settings_do_not_show(codec: str) -> None:
    """Neither those of another thread nor this thread's own change a byte or a bit, nor do they get lost."""
    matrix = gaussian((160, 160))
    expected = tersor.compress(matrix, codec=codec)
    rows = expected.decode()
    elsewhere(lambda: torch.set_float32_matmul_precision("medium"))
    torch.set_num_threads(2)
    for mode in HOSTILE.values():
        with mode():
            found = tersor.compress(matrix, codec=codec)
            assert digest(found.tensors) == digest(expected.tensors)
            assert torch.equal(found.decode(), rows)
    found = elsewhere(lambda: tersor.compress(matrix, codec=codec))
    assert digest(found.tensors) == digest(expected.tensors)
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("method", ["lplr", "lsvd", "dsvd", "alternating"])
def test_low_rank_methods_do_not_depend_on_torchs_precision(method: str) -> None:
    """The plainest of them once did, through the products with which they sketch."""
    matrix = gaussian((300, 280))
    codec = "lr24(mm8;mm8)"
    expected = tersor.compress(matrix, codec=codec, method=method)
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        assert digest(tersor.compress(matrix, codec=codec, method=method).tensors) == digest(expected.tensors)


def test_many_threads_at_once_give_the_same_bytes() -> None:
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    matrix = gaussian((128, 128))
    expected = digest(tersor.compress(matrix, codec="lr16(mm8;mm8)").tensors)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(
        digest(tersor.compress(matrix, codec="lr16(mm8;mm8)").tensors))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6
    assert torch.get_float32_matmul_precision() == "medium"
    assert elsewhere(torch.get_num_threads) == torch.get_num_threads() == 2

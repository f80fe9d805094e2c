"""What a run may encode with is tried ahead, the likeliest first; a processor compiles nothing and tries nothing."""

import threading
from typing import Any

import pytest
import torch

from tersor.errors import CodecConfigError
from tersor.families import stand_in
from tersor.hf.compress import warming
from tersor.hf.compress.method import rungs
from tersor.hf.compress.request import Request
from tersor.hf.models.source import Source, open_source
from tests.hf.tiny import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("warming")
    return open_source(save_tiny("llama", folder / "model"), folder / "unused")


@pytest.fixture
def request_of(source: Source) -> Request:
    return Request(int(3.0 * source.elements / 8), "trellis")


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def note(dense: torch.Tensor, codec: Any, hessian: torch.Tensor | None, *given: Any) -> None:
        found.append((codec, tuple(dense.shape), hessian is not None))

    monkeypatch.setattr(warming, "encode_matrix", note)
    return found


def test_trials_come_first_then_what_is_nearest_to_the_rate(source: Source, request_of: Request) -> None:
    shape = warming.largest(source)
    assert shape == (128, 64)  # the head: embeddings have as many rows, and are not encoded along outputs alone
    listed = warming.tried(source, request_of, shape)
    few = [codec for codec, _, fed in listed if fed]
    assert sorted(map(str, few)) == sorted(map(str, rungs(request_of, shape, 3.0)))
    off = [abs(codec.rate(shape) - 8 * request_of.budget / source.elements) for codec in few]
    assert off == sorted(off)
    assert {codec for codec, _, fed in listed if not fed} == {stand_in(codec, shape)[0] for codec in few} - {*few}
    assert [fed for *_, fed in listed] == sorted(fed for *_, fed in listed)
    assert all(rows <= shape[0] and width <= shape[1] for _, (rows, width), _ in listed)


@pytest.mark.parametrize("calibrated", [True, False])
def test_threads_share_the_codecs_and_try_each_once(source: Source, request_of: Request, noted: list[Any],
                                                    *, calibrated: bool) -> None:
    for own in range(warming.THREADS):
        warming.warm(source, request_of, CPU, own, threading.Event(), calibrated=calibrated)
    listed = warming.tried(source, request_of, warming.largest(source))
    assert sorted((str(codec), shape) for codec, shape, _ in noted) == sorted((str(c), shape) for c, shape, _ in listed)
    assert {str(codec): fed for codec, _, fed in noted} == {str(codec): fed and calibrated for codec, _, fed in listed}


def test_what_is_tried_encodes(source: Source, request_of: Request) -> None:
    warming.warm(source, request_of, CPU, 0, threading.Event(), calibrated=True)


def test_one_codec_that_is_refused_keeps_no_other_back(source: Source, request_of: Request,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def refuse(dense: torch.Tensor, codec: Any, *given: Any) -> None:
        begun.append(str(codec))
        raise CodecConfigError("no")

    monkeypatch.setattr(warming, "encode_matrix", refuse)
    warming.warm(source, request_of, CPU, 0, threading.Event(), calibrated=True)
    listed = warming.tried(source, request_of, warming.largest(source))[:: warming.THREADS]
    assert begun == [str(codec) for codec, *_ in listed]


def test_nothing_is_begun_once_the_run_is_over(source: Source, request_of: Request, noted: list[Any]) -> None:
    stop = threading.Event()
    stop.set()
    warming.warm(source, request_of, CPU, 0, stop, calibrated=True)
    assert noted == []


def test_errors_there_are_none_of_the_run(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail(*given: Any, **named: Any) -> None:
        begun.append(given)
        raise ZeroDivisionError

    monkeypatch.setattr(warming, "warm", fail)
    with warming.ahead(source, Request(1, "trellis"), "cuda:0", calibrated=True):
        pass
    assert len(begun) == warming.THREADS


def test_a_processor_tries_nothing(source: Source, request_of: Request, noted: list[Any]) -> None:
    before = threading.active_count()
    with warming.ahead(source, request_of, "cpu", calibrated=True):
        assert threading.active_count() == before
    assert noted == []


def test_the_seed_of_torch_is_left_alone(source: Source, request_of: Request, noted: list[Any]) -> None:
    before = torch.random.get_rng_state()
    warming.warm(source, request_of, CPU, 0, threading.Event(), calibrated=True)
    assert noted
    assert torch.equal(torch.random.get_rng_state(), before)

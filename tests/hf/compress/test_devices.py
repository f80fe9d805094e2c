"""Several devices give the bytes of one, whatever runs where; a machine without GPUs stands in with `cpu,cpu`."""

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor import store
from tersor.contract import feedback
from tersor.errors import ModelError
from tersor.hf import compress_model
from tersor.hf.compress import desk, reading, survey
from tersor.hf.compress.crew import TOGETHER, Hands, Task, longest_first
from tersor.hf.compress.request import Sampling, usable_devices
from tersor.hf.models.flow import Flow, in_order, room_for
from tersor.numerics.linalg import inverse_cholesky
from tersor.numerics.remembered import remembered
from tests.hf.tiny import save_tiny, save_tokenizer

CPU = torch.device("cpu")
SETTINGS = {"method": "rotated_scalar", "evaluation_tokens": 0, "sampling": Sampling(1536, 256, 64)}
FILES = ("model.safetensors", "tersor.json", "config.json")
BATCH = 512  # tokens: three batches
pytestmark = pytest.mark.usefixtures("read_back_here")


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_TOKENS", BATCH)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    for name in ("llama_tied", "qwen3_moe"):
        save_tokenizer(save_tiny(name, folder / name, num_hidden_layers=1))
    return folder


@pytest.fixture
def source(models: Path) -> Path:
    return models / "llama_tied"


def digest(out: Path) -> str:
    return hashlib.sha256(b"".join((out / name).read_bytes() for name in FILES)).hexdigest()


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_bytes_do_not_depend_on_devices(name: str, models: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    found, hands = {}, set[tuple[str, str]]()

    def seen(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def note(*given: Any, **named: Any) -> Any:
            hands.add((what, threading.current_thread().name))
            return work(*given, **named)
        return note

    monkeypatch.setattr(desk, "encode_order", seen("encode", desk.encode_order))
    monkeypatch.setattr(survey, "trials", seen("survey", survey.trials))
    monkeypatch.setattr(Flow, "_one", seen("text", Flow._one))
    for devices in (None, "cpu,cpu", "cpu,cpu,cpu"):
        hands.clear()
        compress_model(models / name, tmp_path / str(devices), 6.0, devices=devices, **SETTINGS)
        found[devices] = digest(tmp_path / str(devices))
        assert {what for what, _ in hands} == {"encode", "survey", "text"}
        assert devices is None or all(name.startswith(("tersor-hand", "tersor-batch")) for _, name in hands)
    assert len(set(found.values())) == 1


def test_another_number_of_devices_goes_on(source: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "encode" and done > total // 2:
            raise KeyboardInterrupt

    compress_model(source, tmp_path / "unbroken", 6.0, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        compress_model(source, tmp_path / "out", 6.0, progress=stop, **SETTINGS)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.work" / "matrices").iterdir()}
    told: list[int] = []
    compress_model(source, tmp_path / "out", 6.0, devices="cpu,cpu", **SETTINGS,
                   progress=lambda stage, done, total: told.append(done) if stage == "encode" else None)
    assert told[:2] == [0, len(kept)]  # all that was there is found
    assert digest(tmp_path / "out") == digest(tmp_path / "unbroken")


def scaled(tensor: torch.Tensor, by: torch.Tensor) -> float:
    time.sleep(0.01)
    return float((tensor * by).sum())


def test_tasks_are_done_longest_first_and_each_brings_its_own_result() -> None:
    by, begun = torch.full((2,), 3.0), []

    def ready(number: int) -> tuple[torch.Tensor]:
        begun.append(number)
        return (torch.full((2,), float(number)),)

    tasks = [Task(str(n), scaled, lambda n=n: ready(n), n % 4, (by,)) for n in range(8)]
    found = {task.name: result for task, result in Hands([CPU, CPU]).each(tasks)}
    assert found == {str(n): 6.0 * n for n in range(8)}
    assert begun == [3, 7, 2, 6, 1, 5, 0, 4] == [int(task.name) for task in reversed(longest_first(tasks))]


def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    yield from threads(1)


@pytest.mark.usefixtures("one_thread")
def test_what_one_task_alone_needs_is_let_go_of() -> None:
    given, held = [torch.ones(1), torch.ones(1)], list[Any]()

    def work(need: torch.Tensor) -> None:
        held.append(weakref.ref(remembered(need, "twice", lambda: 2 * need)))

    tasks = [Task(name, work, lambda: (), 1, (given[number],)) for name, number in (("q", 0), ("k", 0), ("o", 1))]
    done = Hands([CPU]).each(tasks)
    next(done)
    next(done)
    assert held[0]() is held[1]() is not None
    next(done)
    assert held[0]() is None
    assert held[2]() is None  # though the crew is there still


@pytest.mark.usefixtures("one_thread")
def test_a_block_factors_a_hessian_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def noted(hessian: torch.Tensor, damping: float) -> torch.Tensor:
        made.append(hessian.shape[0])
        return inverse_cholesky(hessian, damping)

    monkeypatch.setattr(feedback, "inverse_cholesky", noted)
    compress_model(source, tmp_path / "out", 6.0, devices="cpu", **SETTINGS)
    opened = store.read(tmp_path / "out")
    inner = [name for name in opened.matrix_names() if "layers" in name]
    assert len(inner) == 7  # of them three read one input, and two another
    assert len(made) == 4 + len(opened.matrix_names()) - len(inner)


def test_the_first_error_ends_all() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    begun: list[int] = []
    tasks = [Task(str(n), fail, lambda n=n: begun.append(n) or (), 1) for n in range(9)]
    with pytest.raises(ZeroDivisionError):
        list(Hands([CPU, CPU]).each(tasks))
    assert len(begun) == 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    yield from threads(2)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("cost", "at_once"), [(8, 2), (TOGETHER // 2 + 1, 1)])
def test_one_processor_works_on_several_small_tasks_at_once(cost: int, at_once: int) -> None:
    meet = threading.Barrier(at_once)

    def work(number: int) -> tuple[int, int]:
        return number, meet.wait(10)  # breaks unless so many are there at once

    tasks = [Task(str(n), work, lambda n=n: (n,), cost) for n in range(4)]
    found = [result for _, result in Hands([CPU]).each(tasks)]
    assert sorted(number for number, _ in found) == list(range(4))
    assert {place for _, place in found} == set(range(at_once))


@pytest.mark.usefixtures("two_threads")
def test_bytes_do_not_depend_on_threads(source: Path, tmp_path: Path) -> None:
    compress_model(source, tmp_path / "two", 6.0, **SETTINGS)
    torch.set_num_threads(1)
    compress_model(source, tmp_path / "one", 6.0, **SETTINGS)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_batches_take_devices_in_turn_and_results_their_order() -> None:
    used: list[tuple[int, str]] = []

    def work(number: int) -> int:
        time.sleep(0.002 * (7 - number))
        used.append((number, threading.current_thread().name))
        return number

    assert list(in_order(7, work, devices=[CPU, CPU, CPU])) == list(range(7))
    assert len({name for _, name in used}) == 3
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert (room_for(gpus, 1 << 40, 1), room_for([CPU, CPU], 1 << 40, 1), room_for([CPU], 2, 10)) == (2, 1, 5)


@pytest.mark.parametrize(("text", "says"), [
    ("0", "expected so many GPUs"), ("99", "--devices 99: expected so many GPUs, found"), ("cpu,", "names of devices"),
    ("", "names of devices"), ("cpu,meta", "of one kind, found cpu, meta"),
    ("cpu,cuda:77", "'cuda:77' cannot be used")])
def test_devices_that_cannot_be_meant(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        usable_devices(text)


def test_devices_that_are_meant() -> None:
    assert usable_devices("cpu, cpu") == ("cpu", "cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert usable_devices("auto") == (tuple(f"cuda:{n}" for n in range(count)) or ("cpu",))


@pytest.mark.gpu
@pytest.mark.parametrize("devices", ["cuda:0,cuda:0", "2"])
def test_bytes_do_not_depend_on_gpus(devices: str, source: Path, tmp_path: Path) -> None:
    if devices == "2" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    compress_model(source, tmp_path / "one", 6.0, device="cuda", **SETTINGS)
    compress_model(source, tmp_path / "several", 6.0, devices=devices, **SETTINGS)
    assert digest(tmp_path / "one") == digest(tmp_path / "several")

"""Several devices give the bytes of one, whatever runs where; a machine without GPUs stands in with `cpu,cpu`."""

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor import store
from tersor.contract import feedback
from tersor.errors import ModelError
from tersor.hf import compress_model
from tersor.hf.compress import crew, desk, reading, survey
from tersor.hf.compress.crew import TOGETHER, Hands, Task, by_need, longest_first
from tersor.hf.compress.desk import Order, encode_order
from tersor.hf.compress.request import Sampling, usable_devices
from tersor.hf.models.flow import Flow, in_order, room_for
from tersor.numerics.linalg import inverse_cholesky
from tersor.numerics.remembered import remembered
from tersor.registry import parse
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


def test_bytes_do_not_depend_on_lanes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress_model(source, tmp_path / "one", 6.0, **SETTINGS)
    asked: list[int] = []

    def lanes(self: Hands, groups: Sequence[Sequence[Task]]) -> int:
        asked.append(len(groups))
        return min(3, len(groups))

    monkeypatch.setattr(Hands, "_lanes", lanes)
    compress_model(source, tmp_path / "several", 6.0, **SETTINGS)
    assert 4 in asked  # of a block's seven matrices
    assert digest(tmp_path / "one") == digest(tmp_path / "several")


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


def test_groups_need_the_same_and_the_longest_is_taken_first() -> None:
    inputs = [torch.zeros(1) for _ in range(3)]
    needs = {"q": (inputs[0],), "k": (inputs[0],), "o": (inputs[1],), "gate": (inputs[2],), "up": (inputs[2],),
             "down": (None,), "head": ()}
    costs = {"q": 4, "k": 1, "o": 4, "gate": 14, "up": 14, "down": 14, "head": 5}
    groups = by_need([Task(name, scaled, lambda: (), costs[name], needs[name]) for name in needs])
    assert [[task.name for task in group] for group in reversed(groups)] == [["gate", "up"], ["down"], ["q", "k"],
                                                                             ["head"], ["o"]]


class Lanes(Hands):
    """A processor that does as one GPU does."""

    def _lanes(self, groups: Sequence[Sequence[Task]]) -> int:
        return min(2, len(groups))


def made_of(need: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    return remembered(need, "twice", lambda: 2 * need)


def test_lanes_keep_to_what_their_group_needs_and_share_what_is_made_of_it() -> None:
    inputs = [torch.full((1,), float(n)) for n in range(4)]
    tasks = [Task(f"{n}{part}", made_of, lambda: (), 1 + n, (inputs[n],)) for n in range(4) for part in "abc"[: 1 + n]]
    found = {task.name: result for task, result in Lanes([CPU]).each(tasks)}
    assert found.keys() == {task.name for task in tasks}
    for name, made in found.items():
        assert made is found[f"{name[0]}a"]
        assert float(made) == 2.0 * int(name[0])


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
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["rot,tr3o", "rot,rows100(tr4o;tr3o)", "rot,lm3"])
def test_lanes_of_a_gpu_give_the_bytes_of_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams run at once, and tensors of one are let go of while others run: nothing of that may show."""
    device, codec, found = torch.device("cuda"), parse(text), dict[int, dict[str, Any]]()
    random = torch.Generator(device).manual_seed(0)
    needs = [torch.randn(2 * width, width, device=device, generator=random) for width in (256, 256, 1024, 512)]
    hessians = [x.T @ x / len(x) for x in needs]
    shapes = [(768, 256), (256, 256), (512, 1024), (512, 512)]
    drawn = [torch.randn(shape, device=device, generator=random) for shape in shapes for _ in range(3)]
    for lanes in (1, 3):
        monkeypatch.setattr(crew, "LANES", lanes)
        tasks = [Task(str(n), encode_order, lambda n=n: (Order(str(n), codec, 0, {"feedback": True}, 0.0), drawn[n]),
                      drawn[n].numel(), (hessians[n // 3],)) for n in range(len(drawn))]
        hands = Hands([device])
        assert hands._lanes(crew.by_need(tasks)) == lanes
        found[lanes] = {task.name: tensors for task, (tensors, _) in hands.each(tasks)}
    assert found[1].keys() == found[3].keys()
    for name, tensors in found[1].items():
        assert all(torch.equal(tensor, found[3][name][key]) for key, tensor in tensors.items())

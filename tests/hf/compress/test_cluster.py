"""A local Ray cluster of two workers gives the bytes of one machine, loses workers, and is told apart from a fault."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tersor.cli import main
from tersor.errors import BudgetError, ModelError
from tersor.hf import compress_model
from tersor.hf.compress import desk
from tersor.hf.compress.cluster import Cluster
from tersor.hf.compress.crew import Task
from tersor.hf.compress.request import Sampling
from tests.hf.compress.orders import killed, refuse, scaled
from tests.hf.tiny import save_tiny, save_tokenizer

CPU = torch.device("cpu")
SETTINGS = {"method": "rot,lm3", "evaluation_tokens": 0, "sampling": Sampling(512, context=64)}
FILES = ("model.safetensors", "tersor.json", "config.json")
pytestmark = pytest.mark.usefixtures("read_back_here")


@pytest.fixture(scope="module")
def crew() -> Iterator[Cluster]:
    pytest.importorskip("ray")
    with Cluster([CPU, CPU]) as found:
        yield found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster") / "model"
    save_tokenizer(save_tiny("llama", folder, num_hidden_layers=1))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_a_worker_may_die_once(crew: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """A second death ends the run with one line; the next one goes on, to the bytes of one machine."""
    compress_model(source, tmp_path / "here", 6.0, **SETTINGS)
    deaths = {"self_attn.q_proj.weight": 1, "mlp.up_proj.weight": 2}
    command = ["tersor", "--quiet", "compress", str(source), str(tmp_path / "there"), "--codec", "rot,lm3", "--rate",
               "6", "--tokens", "512", "--context", "64", "--evaluation-tokens", "0", "--devices", "cpu,cpu",
               "--engine", "ray"]
    monkeypatch.setattr(sys, "argv", command)
    with monkeypatch.context() as patched:
        patched.setattr(desk, "encode_order", functools.partial(killed, str(tmp_path), deaths))
        with pytest.raises(SystemExit) as ended:
            main()
    told = capsys.readouterr().err.strip()
    assert len(list(tmp_path.glob("*.weight.*"))) == 3
    assert ended.value.code == 2
    assert "mlp.up_proj.weight': the worker died, and so did" in told
    assert "\n" not in told
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "there.work" / "matrices").iterdir()}
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert 0 < len(kept) < 9
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_tensors_arrive_as_they_are_and_errors_as_what_they_are(crew: Cluster) -> None:
    one = torch.ones(3, 5, dtype=torch.bfloat16)
    tasks = [Task(str(n), scaled, lambda n=n: (n * torch.ones(5, 3, dtype=torch.bfloat16).T,), n, (None, one))
             for n in range(6)]
    found = {task.name: result for task, result in crew.each(tasks)}
    assert found.keys() == {str(n) for n in range(6)}
    assert all(torch.equal(result, one * (int(name) + 1)) for name, result in found.items())
    with pytest.raises(BudgetError, match="no room") as caught:
        list(crew.each([Task("odd", refuse, lambda: ("no room",), 1)]))
    assert type(caught.value) is BudgetError


def test_workers_of_another_version_are_refused(crew: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_facts", ("tersor 99", "torch 1"))
    with pytest.raises(ModelError, match=r"a worker has tersor .*expected tersor 99, torch 1"):
        list(crew.each([Task("any", abs, lambda: (-1,), 1)]))


def test_engines_that_cannot_be_meant(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, says in (("spark", "expected ray, or ray:ADDRESS"), ("ray:", "expected ray, or ray:ADDRESS")):
        with pytest.raises(ModelError, match=says):
            compress_model(source, tmp_path / "out", 6.0, engine=engine, **SETTINGS)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelError, match=r"install tersor\[ray\]"):
        compress_model(source, tmp_path / "out", 6.0, engine="ray", **SETTINGS)
    assert not (tmp_path / "out.work").exists()

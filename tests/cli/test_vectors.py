"""`tersor vectors`: an index from a file and back, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tersor import cli
from tersor.cli.funnel import account
from tersor.testing import gaussian
from tersor.vectors import Index
from tests.ops.devices import GPU

DIM = 16


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", gaussian((600, DIM), 1).numpy())
    np.save("q.npy", gaussian((5, DIM), 2).numpy())
    np.save("ids.npy", np.arange(600)[::-1] * 7)
    return tmp_path


def run(*arguments: str) -> str:
    found = CliRunner().invoke(cli.app, ["--quiet", "vectors", *arguments])
    assert found.exit_code == 0, found.output
    return found.stdout


def refused(*arguments: str) -> str:
    found = CliRunner().invoke(cli.app, ["--quiet", "vectors", *arguments])
    assert found.exception is not None
    text, code = account(found.exception)
    assert code == 2 or isinstance(found.exception, SystemExit), text
    return text


def test_there_and_back() -> None:
    made = json.loads(run("build", "x.npy", "set", "--codec", "IVF4,trellis3", "--ids", "ids.npy", "--metric", "ip",
                          "--json"))
    assert (made["vectors"], made["dim"], made["lists"], made["metric"]) == (600, DIM, 4, "ip")
    assert made["bytes"] == Index.load("set").nbytes
    assert json.loads(run("info", "set", "--json")) == made
    assert "600" in run("info", "set")
    queries, index = np.load("q.npy"), Index.load("set")
    found = json.loads(run("search", "set", "q.npy", "-k", "3", "--nprobe", "4", "--json"))
    assert found["ids"] == index.search(queries, 3, nprobe=4)[1].tolist()
    run("search", "set", "q.npy", "-k", "3", "--nprobe", "4", "--out", "found.npy")
    assert np.load("found.npy").tolist() == found["ids"]
    assert np.allclose(np.load("found.distances.npy"), found["distances"])
    assert "ids" in run("search", "set", "q.npy")


@GPU
def test_on_a_gpu() -> None:
    run("build", "x.npy", "set", "--codec", "trellis3")
    found = json.loads(run("search", "set", "q.npy", "-k", "3", "--device", "cuda", "--json"))
    assert found["ids"] == Index.load("set").search(np.load("q.npy"), 3)[1].tolist()
    (tried, *_) = json.loads(run("bench", "x.npy", "--codec", "trellis3", "--device", "cuda", "--json"))["methods"]
    assert tried["recall"] > 0.5


def test_what_is_no_device() -> None:
    run("build", "x.npy", "set", "--codec", "trellis3")
    assert "no 'cuda:99'" in refused("search", "set", "q.npy", "--device", "cuda:99")
    assert run("search", "set", "q.npy", "--device", "auto", "--json")


def test_what_is_found_is_scored_again() -> None:
    run("build", "x.npy", "set", "--rate", "1.5")
    exact = ((np.load("q.npy")[:, None] - np.load("x.npy")) ** 2).sum(2).argsort(1)[:, :2]
    found = json.loads(run("search", "set", "q.npy", "-k", "50", "--refine", "x.npy", "--json"))
    assert np.mean(np.array(found["ids"])[:, :2] == exact) > 0.8


def test_beside_faiss() -> None:
    asked = "--codec", "trellis3", "--codec", "rot,lm4", "--plot", "plot.svg"
    found = json.loads(run("bench", "x.npy", *asked, "--json"))
    ours = [one for one in found["methods"] if not one["method"].startswith("FAISS")]
    assert [one["method"] for one in ours] == [str(Index(DIM, "trellis3").codec), "rot,lm4"]
    assert all(0.3 < one["recall"] <= 1 for one in ours)
    assert "<circle" in Path("plot.svg").read_text()
    np.save("truth.npy", Index.load(_built()).search(np.load("q.npy"), 10)[1])
    known = json.loads(run("bench", "x.npy", "--queries", "q.npy", "--truth", "truth.npy", "--codec", "fp32", "--json"))
    assert known["methods"][0]["recall"] == 1.0
    assert "recall@10" in run("bench", "x.npy", "--codec", "fp32")


def test_few_vectors_are_compared_with_what_fits_them() -> None:
    """FAISS trains no more words than there are vectors."""
    np.save("few.npy", np.load("x.npy")[:30])
    found = json.loads(run("bench", "few.npy", "-k", "3", "--codec", "fp32", "--json"))
    assert not any("x8np" in one["method"] for one in found["methods"])
    assert found["methods"][0]["recall"] == 1.0


def test_a_picture_may_be_a_png() -> None:
    pytest.importorskip("matplotlib")
    run("bench", "x.npy", "--codec", "trellis3", "--codec", "rot,lm4", "--plot", "plot.png")
    held = Path("plot.png").read_bytes()
    assert held.startswith(b"\x89PNG\r\n\x1a\n")
    assert held[16:24] == (960).to_bytes(4, "big") + (600).to_bytes(4, "big")


def test_a_png_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused("bench", "x.npy", "--plot", "plot.png")


def test_known_neighbours_must_be_those_of_the_queries() -> None:
    for shape in ((5,), (4, 10), (5, 9)):
        np.save(f"truth{len(shape)}{shape[0]}.npy", np.zeros(shape, np.int64))
        told = refused("bench", "x.npy", "--queries", "q.npy", "--truth", f"truth{len(shape)}{shape[0]}.npy")
        assert "ids of at least 5 queries, 10 each" in told


def _built() -> str:
    run("build", "x.npy", "exact", "--codec", "fp32")
    return "exact"


def test_an_export_is_read_by_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    run("build", "x.npy", "set", "--codec", "pq2x16t")
    told = json.loads(run("export", "set", "set.faiss", "--json"))
    assert told["kind"] == "IndexPQ"
    ids = faiss.read_index("set.faiss").search(np.load("q.npy"), 3)[1]
    assert ids.tolist() == Index.load("set").search(np.load("q.npy"), 3)[1].tolist()


def test_what_is_refused() -> None:
    run("build", "x.npy", "set")
    for arguments, message in ((("build", "x.npy", "set"), "set exists"), (("build", "no.npy", "new"), "no such file"),
                               (("build", "x.npy", "new", "--rate", "0.01"), "too few"),
                               (("build", "x.npy", "new", "--metric", "dot"), "metric must be one of"),
                               (("build", "x.npy", "new", "--ids", "x.npy"), "expected integers"),
                               (("build", "x.npy", "new", "--column", "v"), "of tables only"),
                               (("search", "nowhere", "q.npy"), "expected an index"),
                               (("search", "set", "ids.npy"), "expected floats"),
                               (("export", "set", "out", "--to", "lance"), "expected faiss"),
                               (("bench", "x.npy", "--plot", "plot.pdf"), "expected a file as .svg or .png"),
                               (("bench", "x.npy", "--truth", "ids.npy"), "expected --queries")):
        assert message in refused(*arguments)
    assert sorted(path.name for path in Path().iterdir()) == ["ids.npy", "q.npy", "set", "x.npy"]

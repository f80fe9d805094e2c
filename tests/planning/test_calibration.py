"""Streamed moments against float64, and the calibration file."""

from pathlib import Path

import pytest
import torch

from tersor.errors import CorruptStoreError, NonFiniteError
from tersor.planning.calibration import STRIP, TRUST, Calibration, ChangeSum, MomentSum, compensated
from tersor.testing import gaussian


@pytest.mark.parametrize("width", [32, STRIP + 32])
def test_moments_equal_float64(width: int) -> None:
    x = gaussian((400, width), 0) * torch.logspace(-2, 2, width)
    moments = MomentSum(width, torch.device("cpu"))
    for part in x.split(37):
        moments.add(part)
    wide = x.double()
    expected = wide.T @ wide / 400
    got = moments.mean("m")
    # each entry is a float32 sum of 400 products: error at most 400 eps of the product of the columns' norms
    norms = wide.norm(dim=0)
    bound = 400 * torch.finfo(torch.float32).eps * torch.outer(norms, norms) / 400
    assert bool(((got.double() - expected).abs() <= bound).all())
    assert torch.equal(got, got.T)
    assert moments.count == 400


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x, y = gaussian((96, 8), 0), gaussian((96, 8), 1)
    moments, change = MomentSum(8, torch.device("cpu")), ChangeSum(x[:32], y[:32])
    for part in (slice(0, 32), slice(32, 96)):
        own = MomentSum(8, torch.device("cpu"))
        own.add(x[part])
        moments.merge(own)
    change.merge(ChangeSum(x[32:], y[32:]))
    torch.testing.assert_close(moments.mean("m"), x.T @ x / 96)
    torch.testing.assert_close(change.mean(), (x - y).T @ y / 96)


@pytest.mark.parametrize("size", [0.1, 1.0])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_compensation_is_the_least_squares_solution(ridge: float, size: float) -> None:
    """Against the normal equations' slow form: stacked rows of inputs and of the ridge, solved in float64."""
    x, w = gaussian((200, 12), 0).double(), gaussian((5, 12), 1).double()
    y = x + size * (0.3 * gaussian((200, 12), 2) + 0.2 * x[:, :1])
    hessian = y.T @ y / 200
    weight = (ridge * float(hessian.diagonal().mean()) * 200) ** 0.5
    rows = torch.cat([y, weight * torch.eye(12, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([x @ w.T, weight * w.T])).solution.T
    share = float(((expected - w) @ hessian * (expected - w)).sum() / (w @ hessian * w).sum())
    assert (share > TRUST) == (size == 1.0)
    moved = (w + 0.1 * gaussian((5, 12), 3)).double()
    for start, near in ((w, None), (moved, moved.float())):
        expected = torch.linalg.lstsq(rows, torch.cat([x @ w.T, weight * start.T])).solution.T
        step = expected - start  # which goes no further than is trusted
        share = float((step @ hessian * step).sum() / (w @ hessian * w).sum())
        found = compensated(w.float(), ((x - y).T @ y / 200).float(), hessian.float(), ridge, near)
        # float32, conditioned by (1 + ridge) / ridge times the spread of the moments' eigenvalues, below 100 here
        torch.testing.assert_close(found.double(), start + step * min(1.0, (TRUST / share) ** 0.5), rtol=0, atol=1e-4)
    same = compensated(w.float(), torch.zeros(12, 12), hessian.float(), ridge)
    assert torch.equal(same, w.float())  # equal inputs need no other matrix


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_activations_are_named(bad: float) -> None:
    x = gaussian((4, 8), 0)
    x[1, 2] = bad
    moments = MomentSum(8, torch.device("cpu"))
    moments.add(x)
    with pytest.raises(NonFiniteError, match=r"layer\.q"):
        moments.mean("layer.q")


def test_file_keeps_sharing_and_provenance(tmp_path: Path) -> None:
    h = gaussian((8, 8), 1)
    h = h @ h.T
    saved = Calibration({"q": h, "k": h, "o": 2 * h}, 1024, "text sha256:0", {"q": 0.5})
    saved.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.tokens == 1024
    assert loaded.source == "text sha256:0"
    assert loaded.fisher == {"q": 0.5}
    Calibration({"q": h, "k": h, "o": 3 * h}, 1024, "text sha256:0", {"q": 0.5}).save(tmp_path / "other")
    assert len({loaded.sha256, Calibration.load(tmp_path / "other").sha256, saved.sha256}) == 3
    assert loaded.hessians["q"].data_ptr() == loaded.hessians["k"].data_ptr()
    assert torch.equal(loaded.hessians["o"], 2 * h)
    assert (tmp_path / "c.safetensors").stat().st_size < 2 * 8 * 8 * 4 + 1000


def test_file_keeps_how_rows_add_up(tmp_path: Path) -> None:
    h, blocks = torch.eye(8), (2 * torch.eye(4), torch.ones(2, 2))
    Calibration({"q": h}, 64, "text", sides={"q": blocks}).save(tmp_path / "c")
    found = Calibration.load(tmp_path / "c").sides
    assert list(found) == ["q"]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found["q"], blocks, strict=True))
    Calibration({"q": h}, 64, "text", sides={"q": (torch.ones(2, 3),)}).save(tmp_path / "odd")
    with pytest.raises(CorruptStoreError, match="float32 squares"):
        Calibration.load(tmp_path / "odd")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no")
    for name in ("x", "missing"):
        with pytest.raises(CorruptStoreError, match="calibrate"):
            Calibration.load(tmp_path / name)

"""Cases in a process of their own: results come through, and a crash costs one case."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bench.suite import Asked, Result, Unmeasured
from bench.suites.gpu.cases import Ceiling, Product, Profile
from bench.suites.gpu.kernels import Ratios
from bench.worker import Run


def test_a_failed_case_costs_itself_only(tmp_path: Path) -> None:
    """A rehearsal: one case fails, one is left out, and two give results."""
    bad, good = Product((16, 32), "nonsense", batches=(1,)), Product((16, 32), "bf16", batches=(1, 2))
    ratios = Ratios()
    run = Run("bench.suites.gpu.kernels", Asked(out=tmp_path), finish=ratios.finish, retry=ratios.retry)
    found = list(run.outcomes([bad, Profile((16, 32), "lm2", 1), good, Ceiling("copy")]))
    failed, left = (one for one in found if isinstance(one, Unmeasured))
    assert (failed.key, failed.failed) == (bad.key, True)
    assert (left.key, left.why, left.failed) == ("profile|16x32|lm2|1", "profiles are of GPUs", False)
    assert "nonsense" in (tmp_path / "kernels.failed.txt").read_text()
    measured = [one for one in found if isinstance(one, Result)]
    assert [one.key for one in measured] == ["product|16x32|1|bf16", "product|16x32|2|bf16", "ceiling|copy"]
    assert measured[1].case == {"name": "product|16x32|bf16", "what": "product", "shape": [16, 32], "codec": "bf16",
                                "again": "", "batch": 2}
    assert measured[1].numbers["x_bf16"] == pytest.approx(1)


def test_what_is_left_of_a_failed_case_is_tried_again() -> None:
    case = Product((16, 32), "lm2", batches=(1, 2, 4))
    ratios = Ratios()
    ratios.done[case.key] = [1]
    assert ratios.retry(case, "in time_calls") == dataclasses.replace(case, batches=(2, 4), graph=False)
    assert ratios.retry(case, "elsewhere") == dataclasses.replace(case, batches=(4,))
    assert ratios.retry(case, "SetupError") is None


def test_no_case_is_begun_after_the_limit() -> None:
    run = Run("bench.suites.gpu.kernels", Asked(), limit=-1.0)
    assert [(one.key, one.failed) for one in run.outcomes([Ceiling("copy"), Ceiling("gemm")])
            if isinstance(one, Unmeasured)] == [("ceiling|copy", True), ("ceiling|gemm", True)]

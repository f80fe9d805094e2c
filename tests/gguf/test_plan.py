"""Plans of files: exact sizes, never above the budget, and a least size that is said."""

from __future__ import annotations

import pytest

from tersor.errors import BudgetError
from tersor.gguf import metadata, plan
from tersor.gguf.file import Entry
from tersor.gguf.quantizable import quantizable
from tersor.gguf.types.ladder import BY_NUMBER, rungs
from tersor.gguf.types.plain import F32
from tersor.planning.plan import Choice

PAIRS = [metadata.text("general.architecture", "llama")]
ENTRIES = [*(Entry(f"blk.{number}.ffn_up.weight", (32 + number * 37 % 41, 512), 1) for number in range(60)),
           Entry("blk.0.ffn_down.weight", (16, 1408), 1), Entry("output_norm.weight", (512,), 0)]


def choices() -> dict[str, list[Choice]]:
    found = {}
    for entry in ENTRIES:
        plain = BY_NUMBER[entry.number]
        kinds = rungs(entry.shape[-1]) if quantizable(entry) else []
        found[entry.name] = [*(Choice(kind, kind.tensor_nbytes(entry.elements), 4.0 ** -kind.rate) for kind in kinds),
                             Choice(plain, plain.tensor_nbytes(entry.elements), 0.0)]
    return found


@pytest.mark.parametrize("share", [.18, .2, .25, .3, .45, .9, 2.0])
def test_files_fill_their_budget_and_never_exceed_it(share: float) -> None:
    whole = plan.file_nbytes(PAIRS, ENTRIES, {entry.name: BY_NUMBER[entry.number] for entry in ENTRIES})
    budget = int(share * whole)
    types = plan.spend_file(PAIRS, ENTRIES, choices(), budget)
    nbytes = plan.file_nbytes(PAIRS, ENTRIES, types)
    assert min(.995 * budget, whole) <= nbytes <= budget or nbytes == whole
    assert types["output_norm.weight"] is F32


def test_a_budget_below_the_least_names_it() -> None:
    with pytest.raises(BudgetError, match=r"rows of 1408 weights.*IQ4_NL") as told:
        plan.spend_file(PAIRS, ENTRIES, choices(), 1000)
    least = told.value.least_bytes
    types = plan.spend_file(PAIRS, ENTRIES, choices(), least)
    assert plan.file_nbytes(PAIRS, ENTRIES, types) == least
    with pytest.raises(BudgetError):
        plan.spend_file(PAIRS, ENTRIES, choices(), least - 1)


def test_the_type_of_most_weights_is_said() -> None:
    types = plan.spend_file(PAIRS, ENTRIES, choices(), 10**9)
    told = {pair.key: pair.value() for pair in plan.finished(PAIRS, ENTRIES, types)}
    assert told["general.file_type"] == 1
    assert told["general.quantization_version"] == 2


def test_only_matrices_that_are_multiplied_by_are_quantized() -> None:
    shape = (64, 512)
    assert quantizable(Entry("blk.0.attn_q.weight", shape, 1))
    assert quantizable(Entry("blk.0.ffn_up_exps.weight", (4, *shape), 1))
    for name in ("blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight",
                 "blk.0.ssm_conv1d.weight"):
        assert not quantizable(Entry(name, shape, 1))
    assert not quantizable(Entry("output_norm.weight", (512,), 1))

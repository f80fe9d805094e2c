"""Tables of the package are charged to codecs of Tersor, and to nobody else."""

from typing import Any

import pytest

from bench import charges


def line(nbytes: int, method: str, **numbers: Any) -> dict[str, Any]:
    return {"bytes": nbytes, "case": {"method": method}, "numbers": numbers}


@pytest.mark.parametrize(("found", "more"), [
    (line(9, "qet_plus", codec="rot,sym24"), 4_929), (line(9, "tersor:rot,sym24"), 4_929),
    (line(9, "tersor:qet_plus", setting="sym24m"), 4_929), (line(9, "x", codec="rot,sym24 sym24"), 4_929),
    (line(9, "faiss:RQ25x8", codec="RQ25x8"), 0), (line(9, "qet_plus"), 0), (line(9, "rtn4"), 0)])
def test_what_a_line_is_charged(found: dict[str, Any], more: int) -> None:
    assert charges.package_bytes(found) == more
    assert charges.charged(found) == 9 + more


def test_tables_that_count_nothing_of_it_say_so() -> None:
    small, large = line(50_000, "rot,sym24"), line(2_000_000, "rot,sym32")
    assert charges.note([large, line(10, "rtn4"), line(500_000, "lm4")]) == ""
    assert charges.note([small, large]) == " Not counted: 4,929 bytes of tables that come with the package."
    both = charges.note([small, line(50_000, "rot,sym32")])
    assert both == " Not counted: tables that come with the package, 4,929 to 120,035 bytes a codec."

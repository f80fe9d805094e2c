"""What comes with the package and is in no file: named, sized, and each table once."""

import importlib.resources

import numpy as np
import pytest

from tersor.codecs import BUILT_IN
from tersor.contract.derived import package_nbytes
from tersor.registry import parse


@pytest.mark.parametrize(("codec", "nbytes"), [
    ("sym32", 120_003 + 32), ("sym24", 4_913 + 16), ("sym16f", 544 + 8), ("lm4", 32), ("lmL3", 4), ("fit4", 0),
    ("rtn4", 0), ("bf16", 0), ("pq4x16", 0), ("al1", 17), ("al96", 151_796), ("rot,sym24", 4_929),
    ("sum(sym32;sym16)", 120_035 + 552), ("sum(sym16;sym16m)", 552), ("lr2(al20;al21)", 151_796)])
def test_the_bytes_of_package_tables(codec: str, nbytes: int) -> None:
    assert sum(parse(codec).package_tables().values()) == package_nbytes([parse(codec)]) == nbytes


def test_codecs_share_tables() -> None:
    codecs = [parse(text) for text in ("sym24", "rot,sym24", "sym24m", "rtn4")]
    assert package_nbytes(codecs) == package_nbytes(codecs[:1])
    assert package_nbytes([]) == 0


def test_all_codecs_together_need_no_more_than_the_package_holds() -> None:
    with importlib.resources.files("tersor").joinpath("data/symmetric.npz").open("rb") as file, np.load(file) as data:
        held = sum(data[name].nbytes for name in data.files)
    every = [parse(text) for codec in BUILT_IN for text in codec.examples]
    books = {name: size for codec in every for name, size in codec.package_tables().items()
             if name.startswith("symmetric/")}
    assert max(books.values()) == books["symmetric/32"]
    assert sum(books.values()) <= held

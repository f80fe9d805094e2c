"""What codecs say of their row scales is so: decoded rows are proportional to them, and other rows do not change."""

import dataclasses
from functools import cache

import pytest
import torch

from tersor.contract.codec import Codec, Encoded
from tersor.registry import parse
from tersor.testing import encode, gaussian, tolerance
from tests.laws.codecs import CODECS

SHAPE = (96, 64)
TELLING = [text for text in CODECS if type(parse(text)).row_scales is not Codec.row_scales]  # maybe of no rows


@cache
def told(text: str) -> Encoded:
    """Return a matrix encoded, by the test that asks first: what is collected encodes nothing."""
    return encode(parse(text), gaussian(SHAPE))


def test_codecs_that_have_some() -> None:
    having = {text for text in TELLING if told(text).codec.row_scales(told(text))}
    assert {"rot,lm3", "tr2x8", "tr1.5x8o", "sym16", "rows2(lm3;lm2)"} <= having
    for text in ("rotout,lm2", "sym20m", "klt3", "sum(lm2;rot,lm1)"):  # mixed rows, one for all, none, two a row
        encoded = encode(parse(text), gaussian(SHAPE))
        assert not encoded.codec.row_scales(encoded)


@pytest.mark.parametrize("text", TELLING)
def test_rows_are_proportional(text: str) -> None:
    encoded, covered = told(text), torch.zeros(SHAPE[0], dtype=torch.int64)
    layout, before = encoded.codec.layout(SHAPE), encoded.decode()
    for name, rows in encoded.codec.row_scales(encoded).items():
        spec, held = layout[name], encoded.tensors[name]
        assert spec.dtype == torch.bfloat16
        assert not spec.shared
        covered[rows] += 1
        factors = 2.0 ** torch.randint(-2, 3, (held.numel(),), generator=torch.Generator().manual_seed(1))
        changed = {**encoded.tensors, name: (held.float() * factors.reshape(held.shape)).to(torch.bfloat16)}
        after = dataclasses.replace(encoded, tensors=changed).check(text).decode()
        expected = before.clone()
        expected[rows] *= factors[:, None]
        assert float((after - expected).norm()) <= tolerance(torch.float32, SHAPE[1]) * float(expected.norm())
    assert int(covered.max()) == (1 if encoded.codec.row_scales(encoded) else 0)

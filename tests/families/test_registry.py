"""Ids, configurations and factory strings; what is malformed is refused by a typed error."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor import registry
from tersor.codecs import BUILT_IN, Dense, MixedRows, Rotated, Scalar, Sum, Uniform
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, TersorError, UnknownCodecError
from tersor.registry import codec_classes, from_config, parse

groups = st.one_of(st.none(), st.integers(1, 4096))
axes = st.sampled_from(["in", "out"])
leaves = st.one_of(
    st.builds(Dense, st.sampled_from(["bf16", "fp16", "fp32"])),
    st.builds(Uniform, st.integers(2, 256), groups, st.booleans(), axes),
    st.builds(Scalar, st.integers(2, 64), st.sampled_from(["gaussian", "fitted", "shared"]), groups, axes),
    st.builds(Scalar, st.integers(2, 256), st.sampled_from(["fitted", "shared"]), groups, axes),
)
codecs = st.recursive(leaves, lambda inner: st.one_of(
    st.builds(Rotated, inner, st.sampled_from(["in", "out", "both"]), st.integers(0, 2**40)),
    st.builds(Sum, st.lists(inner, min_size=2, max_size=3).map(tuple)),
    st.builds(MixedRows, inner, inner, st.integers(1, 10**6)),
), max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(codecs)
def test_round_trips(codec: Codec) -> None:
    assert parse(codec.spec()) == codec
    assert from_config(json.loads(json.dumps(codec.to_config()))) == codec
    assert hash(parse(codec.spec())) == hash(codec)
    assert str(codec) == codec.spec()


@pytest.mark.parametrize(("text", "codec"), [
    ("bf16", Dense("bf16")),
    ("rtn4g64", Uniform(16, 64)),
    ("rtn3s", Uniform(8, None, True)),
    ("rtnL5g32o", Uniform(5, 32, False, "out")),
    ("lm3", Scalar(8)),
    ("fit4g128", Scalar(16, "fitted", 128)),
    ("tabL3o", Scalar(3, "shared", None, "out")),
    ("rot,lm3", Rotated(Scalar(8))),
    ("rotboth@7,lm2", Rotated(Scalar(4), "both", 7)),
    ("sum(rot,lm2;rtn2g64)", Sum((Rotated(Scalar(4)), Uniform(4, 64)))),
    ("rot,rows3(lm3;sum(lm1;lm1))", Rotated(MixedRows(Scalar(8), Sum((Scalar(2), Scalar(2))), 3))),
    ("  lm2 ", Scalar(4)),
])
def test_what_strings_mean(text: str, codec: Codec) -> None:
    assert parse(text) == codec
    assert codec.spec() == text.strip()


@pytest.mark.parametrize("cls", BUILT_IN, ids=lambda cls: cls.id)
def test_examples_are_canonical(cls: type[Codec]) -> None:
    assert cls.examples
    for text in cls.examples:
        codec = parse(text)
        assert codec.spec() == text
        assert from_config(json.loads(json.dumps(codec.to_config()))) == codec


@pytest.mark.parametrize(("text", "error"), [
    ("", UnknownCodecError), ("pq8", UnknownCodecError), ("rot,", UnknownCodecError), ("rot,nope", UnknownCodecError),
    ("lm3x", CodecConfigError), ("sum(lm2)", CodecConfigError), ("sum(lm2;lm2", CodecConfigError),
    ("sum()", UnknownCodecError), ("sum(lm2,lm2)", CodecConfigError), ("rows3(lm2)", CodecConfigError),
    ("rows3(lm2;lm2;lm2)", CodecConfigError), ("rows0(lm2;lm1)", CodecConfigError), ("rtnL1", CodecConfigError),
    ("rtn0", CodecConfigError), ("rtn9", CodecConfigError), ("rtnL257", CodecConfigError), ("rtn4g0", CodecConfigError),
    ("lmL65", CodecConfigError), ("lm99999999999999999999", CodecConfigError), ("rtnL999999999999", CodecConfigError),
    ("rot," * 3000 + "lm2", CodecConfigError), ("sum(" * 3000, CodecConfigError), ("lm3)", CodecConfigError),
])
def test_malformed_strings(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(text)


@settings(max_examples=300, deadline=None)
@given(st.text("rotlmsufiab0123456789,;()@gLnw", max_size=24))
def test_any_text_parses_or_raises_a_typed_error(text: str) -> None:
    try:
        codec = parse(text)
    except TersorError:
        return
    assert parse(codec.spec()) == codec


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(UnknownCodecError) as caught:
        from_config({"id": "nope", "version": 1})
    assert caught.value.name == "nope"
    assert set(caught.value.known) == {cls.id for cls in codec_classes().values()}
    assert "allocated" in str(caught.value)
    assert isinstance(caught.value, LookupError)
    with pytest.raises(UnknownCodecError) as caught:
        parse("nope")
    assert {cls.examples[0] for cls in BUILT_IN} < set(caught.value.known)


@pytest.mark.parametrize("version", [2, 0, -1, 99, "1", None, 1.0])
def test_other_versions_are_refused(version: object) -> None:
    with pytest.raises(UnknownCodecError, match="dense version"):
        from_config({**Dense().to_config(), "version": version})
    nested = Rotated(Scalar(4)).to_config()
    with pytest.raises(UnknownCodecError, match="scalar version"):
        from_config({**nested, "inner": {**nested["inner"], "version": version}})


BAD_FIELDS = [
    (Dense(), {"dtype": "int8"}), (Dense(), {"dtype": ["bf16"]}), (Dense(), {"dtype": None}),
    (Uniform(), {"levels": 1}), (Uniform(), {"levels": 2.5}), (Uniform(), {"levels": "16"}),
    (Uniform(), {"group_size": 0}), (Uniform(), {"group_size": "64"}), (Uniform(), {"axis": "up"}),
    (Uniform(), {"symmetric": "no"}), (Scalar(), {"levels": 65}), (Scalar(), {"codebook": "other"}),
    (Rotated(Dense()), {"inner": 3}), (Rotated(Dense()), {"inner": None}), (Rotated(Dense()), {"side": "left"}),
    (Rotated(Dense()), {"seed": -1}), (Rotated(Dense()), {"seed": 0.5}),
    (Sum((Dense(), Dense())), {"stages": []}), (Sum((Dense(), Dense())), {"stages": [1, 2]}),
    (Sum((Dense(), Dense())), {"stages": "ab"}),
    (MixedRows(Dense(), Dense(), 1), {"count": 0}), (MixedRows(Dense(), Dense(), 1), {"first": "bf16"}),
    (Uniform(), {"surprise": 1}),
]


@pytest.mark.parametrize(("codec", "change"), BAD_FIELDS)
def test_unsound_fields(codec: Codec, change: dict[str, object]) -> None:
    with pytest.raises(CodecConfigError) as caught:
        from_config({**codec.to_config(), **change})
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize("codec", [Dense(), Uniform(), Rotated(Scalar())])
def test_missing_fields(codec: Codec) -> None:
    for field in dataclasses.fields(codec):  # type: ignore[arg-type]
        config = codec.to_config()
        del config[field.name]
        with pytest.raises(CodecConfigError, match=field.name):
            from_config(config)


@pytest.mark.parametrize("config", [3, None, "lm3", ["id"], {}, {"id": None}, {"id": ["dense"]}, {"id": {}}])
def test_configurations_that_are_none(config: object) -> None:
    with pytest.raises((CodecConfigError, UnknownCodecError)):
        from_config(config)  # type: ignore[arg-type]


class _Entry:
    def __init__(self, cls: type) -> None:
        self.cls = cls

    def load(self) -> type:
        return self.cls


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> list[_Entry]:
    announced: list[_Entry] = []
    original = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **kwargs: (
        announced if kwargs == {"group": registry.ENTRY_POINTS} else original(**kwargs)))
    codec_classes.cache_clear()
    yield announced
    codec_classes.cache_clear()


def test_third_party_codecs_come_by_entry_point(entry_points: list[_Entry]) -> None:
    mine = type("Mine", (Dense,), {"id": "mine", "grammar": r"mine:(?P<dtype>bf16)"})
    entry_points.append(_Entry(mine))
    assert codec_classes()["mine"] is mine
    assert type(parse("mine:bf16")) is mine
    assert type(from_config({"id": "mine", "version": 1, "dtype": "fp32"})) is mine
    assert type(parse("rot,mine:bf16").children()["inner"]) is mine


def test_two_classes_of_one_id_are_refused(entry_points: list[_Entry]) -> None:
    entry_points.append(_Entry(type("Other", (Dense,), {"id": "uniform"})))
    with pytest.raises(CodecConfigError, match="two codec classes claim the id 'uniform'"):
        codec_classes()


def test_ids_and_grammars_are_distinct() -> None:
    assert len({cls.id for cls in BUILT_IN}) == len({cls.grammar for cls in BUILT_IN}) == len(BUILT_IN)
    assert all(isinstance(cls.version, int) and cls.version >= 1 for cls in BUILT_IN)
    assert all(len(dataclasses.fields(cls)) <= 8 for cls in BUILT_IN)  # type: ignore[arg-type]

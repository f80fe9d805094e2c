"""Malice: manifests and shards made by hand, with their digests made right, still give a typed error and no crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersor import store
from tersor.errors import CodecConfigError, CorruptStoreError, TersorError, UnknownCodecError
from tests.store.attacks.conftest import edit, load_all, read_shard, sign_tensors, write_shard


def refused(path: Path, kind: type[TersorError] = CorruptStoreError) -> str:
    with pytest.raises(kind) as caught:
        load_all(path)
    return str(caught.value)


def test_editing_and_signing_alone_is_sound(damaged: Path) -> None:
    edit(damaged, lambda manifest: manifest["provenance"].update(note="edited"))
    load_all(damaged)
    edit(damaged, lambda manifest: manifest["provenance"].update(note="not signed"), sign=False)
    assert "SHA-256" in refused(damaged)


@pytest.mark.parametrize("version", [2, 999, 0, -1, "1", None, [1], 1.0])
def test_unknown_format_versions(damaged: Path, version: object) -> None:
    edit(damaged, lambda manifest: manifest.update(format_version=version))
    assert "format_version" in refused(damaged, UnknownCodecError)


@pytest.mark.parametrize(("index", "change", "kind"), [
    (0, {"version": 2}, UnknownCodecError), (0, {"version": 0}, UnknownCodecError), (0, {"id": "of the future"},
                                                                                      UnknownCodecError),
    (0, {"id": None}, UnknownCodecError), (0, {"id": ["dense"]}, UnknownCodecError), (0, {"dtype": "int1"},
                                                                                      CodecConfigError),
    (1, {"levels": 10**9}, CodecConfigError), (1, {"levels": -3}, CodecConfigError), (1, {"group_size": 0},
                                                                                      CodecConfigError),
    (1, {"group_size": -64}, CodecConfigError), (1, {"group_size": {}}, TersorError), (1, {"new field": 1},
                                                                                       CodecConfigError),
    (5, {"inner": 3}, CodecConfigError), (5, {"inner": None}, CodecConfigError), (5, {"inner": {}}, TersorError),
    (5, {"inner": []}, CodecConfigError), (5, {"seed": 1e300}, CodecConfigError), (6, {"stages": 7}, CodecConfigError),
    (6, {"stages": [None, None]}, CodecConfigError), (6, {"stages": {}}, TersorError),
])
def test_codecs_that_are_not_known_or_sound(damaged: Path, index: int, change: dict[str, Any],
                                            kind: type[TersorError]) -> None:
    edit(damaged, lambda manifest: manifest["codecs"][index].update(change))
    assert refused(damaged, kind)


def test_a_newer_nested_version(damaged: Path) -> None:
    edit(damaged, lambda manifest: manifest["codecs"][5]["inner"].update(version=2))
    assert "scalar version 2" in refused(damaged, UnknownCodecError)


@pytest.mark.parametrize("field", ["levels", "group_size", "axis", "codebook"])
def test_codec_fields_changed_in_place(bare: Path, field: str) -> None:
    other = {"levels": 4, "group_size": 8, "axis": "out", "codebook": "fitted"}[field]
    edit(bare, lambda manifest: manifest["codecs"][0]["inner"].update({field: other}))
    assert refused(bare)


@pytest.mark.parametrize("manifest", [[], 3, None, "tersor", True, {}, {"format": "tersor"}, {"format": "other"},
                                      {"format": "tersor", "format_version": 1}])
def test_manifests_that_are_none(damaged: Path, manifest: object) -> None:
    edit(damaged, lambda _: manifest)
    if manifest is None:
        (damaged / store.MANIFEST).write_text("null")
    assert "tersor.json" in refused(damaged)


@pytest.mark.parametrize("text", [
    b"", b"{", b"\xff\xfe\x00", b"\x00" * 64, b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"NaN", b'"\\ud800"',
    "é".encode("utf-16"),
])
def test_manifests_that_are_no_json(damaged: Path, text: bytes) -> None:
    (damaged / store.MANIFEST).write_bytes(text)
    assert "tersor.json" in refused(damaged)


PARTS = ["format", "format_version", "kind", "codecs", "matrices", "plain", "shards", "files", "provenance", "sha256"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [None, 3, "text", [], {}, [1], {"a": 1}, {"a": {}}, [[]], -1.5, True])
def test_any_part_of_any_type(damaged: Path, part: str, value: object) -> None:
    """Every part replaced by every kind of thing: refused, or irrelevant to what is read."""
    before = load_all(damaged)
    edit(damaged, lambda manifest: manifest.update({part: value}), sign=part != "sha256")
    try:
        found = load_all(damaged)
    except TersorError:
        return
    assert part in ("files", "provenance", "plain")
    assert all(torch.equal(found[name].decode(), before[name].decode()) for name in before)


@pytest.mark.parametrize("part", PARTS)
def test_missing_parts(damaged: Path, part: str) -> None:
    edit(damaged, lambda manifest: {k: v for k, v in manifest.items() if k != part}, sign=part != "sha256")
    if part == "provenance":  # nothing depends on it
        return
    assert refused(damaged, TersorError)


@pytest.mark.parametrize(("field", "value"), [
    ("shape", [8, 71]), ("shape", [72, 8]), ("shape", [8]), ("shape", [8, 72, 1]), ("shape", [8.0, 72.0]),
    ("shape", [0, 0]), ("shape", [-8, -72]), ("shape", [10**12, 10**12]), ("shape", [True, 72]), ("shape", "872"),
    ("shape", None), ("shape", [None, None]), ("shape", {}), ("shape", [576, 1]),
    ("dtype", "float99"), ("dtype", None), ("dtype", []), ("codec", 99), ("codec", "0"), ("codec", None), ("codec", []),
    ("sha256", "0" * 64), ("sha256", None), ("shard", -1), ("shard", 99), ("shard", "0"), ("shard", None),
    ("shard", 0.0), ("shard", True),
])
def test_records_of_matrices(damaged: Path, field: str, value: object) -> None:
    edit(damaged, lambda manifest: manifest["matrices"]["m1"].update({field: value}))
    assert refused(damaged, TersorError)


def test_a_negative_codec_index(damaged: Path) -> None:
    edit(damaged, lambda manifest: manifest["matrices"]["m8"].update(codec=-1))
    assert refused(damaged)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "\0", 3,
                                  None, "model.safetensors/../model.safetensors", "./model.safetensors"])
@pytest.mark.parametrize("place", ["shards", "files"])
def test_names_that_leave_the_folder(bare: Path, name: Any, place: str) -> None:
    shutil.copy(bare / "model.safetensors", bare.parent / "outside.safetensors")

    def change(manifest: dict[str, Any]) -> None:
        if place == "shards":
            manifest["shards"] = [name]
        else:
            manifest["files"] = {name if isinstance(name, str) else "x/y": "0" * 64}

    edit(bare, change)
    refused(bare)


def test_a_bare_store_must_hold_its_matrix(bare: Path) -> None:
    edit(bare, lambda manifest: manifest.update(kind="unheard of"))
    assert "kind" in refused(bare)


def test_a_bare_kind_with_other_matrices(damaged: Path) -> None:
    edit(damaged, lambda manifest: manifest.update(kind="matrix"))
    assert "bare matrix" in refused(damaged)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a bare store and make every digest right again."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata={"format": "pt"})
    sign_tensors(path, "matrix", {k.removeprefix("matrix/"): t for k, t in tensors.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_not_finite(bare: Path, value: float) -> None:
    rewrite(bare, lambda t: t["matrix/inner/scales"].__setitem__((3, 0), value))
    assert "NaN or infinity" in refused(bare)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("matrix/inner/scales"),
    lambda t: t.update(surprise=torch.zeros(3)),
    lambda t: t.update({"matrix/inner/codes": torch.cat([t["matrix/inner/codes"], torch.zeros(1, dtype=torch.uint8)])}),
    lambda t: t.update({"matrix/inner/codes": t["matrix/inner/codes"][:-1]}),
    lambda t: t.update({"matrix/inner/codes": t["matrix/inner/codes"].reshape(2, -1)}),
    lambda t: t.update({"matrix/inner/codes": t["matrix/inner/codes"].view(torch.int8)}),
    lambda t: t.update({"matrix/inner/scales": t["matrix/inner/scales"].float()}),
    lambda t: t.update({"matrix/inner/scales": t["matrix/inner/scales"].half()}),
    lambda t: t.update({"matrix/inner/scales": t["matrix/inner/scales"].T}),
    lambda t: t.update({"matrix/inner/table": torch.zeros(8)}),
    lambda t: t.update({"elsewhere/inner/codes": t.pop("matrix/inner/codes")}),
], ids=range(11))
def test_tensors_that_are_not_the_layout(bare: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    rewrite(bare, change)
    assert "model.safetensors" in refused(bare)


def test_any_codes_decode(bare: Path) -> None:
    """Codes of noise, with a right digest, are some matrix: finite, no crash."""
    generator = torch.Generator().manual_seed(0)
    rewrite(bare, lambda t: t["matrix/inner/codes"].random_(0, 256, generator=generator))
    assert bool(torch.isfinite(load_all(bare)["matrix"].decode()).all())


def header_attacks() -> dict[str, Callable[[dict[str, Any], int], Any]]:
    codes, scales = "matrix/inner/codes", "matrix/inner/scales"

    def offsets(name: str, start: int, stop: int) -> Callable[[dict[str, Any], int], None]:
        return lambda header, _: header[name].update(data_offsets=[start, stop])

    return {
        "overlapping": lambda h, _: h[scales].update(
            data_offsets=[h[codes]["data_offsets"][0], h[codes]["data_offsets"][0] + 16]),
        "same place": lambda h, _: h.update({codes: {**h[codes], "data_offsets": [0, 216]},
                                             scales: {**h[scales], "data_offsets": [0, 16]}}),
        "past the end": lambda h, size: h[codes].update(data_offsets=[size - 100, size + 116]),
        "huge": offsets(codes, 0, 2**62), "negative": offsets(codes, -216, 0), "reversed": offsets(codes, 216, 0),
        "overflowing": offsets(codes, 2**64 - 1, 2**64 + 215), "empty": offsets(codes, 0, 0),
        "oversized shape": lambda h, _: h[codes].update(shape=[2**62]),
        "overflowing shape": lambda h, _: h[codes].update(shape=[2**32, 2**32]),
        "negative shape": lambda h, _: h[codes].update(shape=[-216]),
        "other dtype": lambda h, _: h[codes].update(dtype="I8"),
        "unknown dtype": lambda h, _: h[codes].update(dtype="Q7"),
        "no offsets": lambda h, _: h[codes].pop("data_offsets"),
        "a list": lambda h, _: h.update({codes: []}),
        "null": lambda h, _: h.update({codes: None}),
        "bad metadata": lambda h, _: h.update(__metadata__={"a": 3}),
    }


@pytest.mark.parametrize("attack", list(header_attacks()))
def test_headers_made_by_hand(bare: Path, attack: str) -> None:
    header, payload = read_shard(bare / "model.safetensors")
    header_attacks()[attack](header, len(payload))
    write_shard(bare / "model.safetensors", header, payload)
    assert "model.safetensors" in refused(bare)


def test_sound_headers_made_by_hand_load(bare: Path) -> None:
    before = load_all(bare)["matrix"].decode()
    header, payload = read_shard(bare / "model.safetensors")
    write_shard(bare / "model.safetensors", dict(reversed(header.items())), payload)
    assert torch.equal(load_all(bare)["matrix"].decode(), before)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_header_lengths(bare: Path, length: int) -> None:
    header, payload = read_shard(bare / "model.safetensors")
    write_shard(bare / "model.safetensors", header, payload, length)
    assert "model.safetensors" in refused(bare)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff" * 20, b'{"a":' * 1000, b"[" * 10_000])
def test_headers_that_are_none(bare: Path, text: bytes) -> None:
    write_shard(bare / "model.safetensors", text, b"")
    assert "model.safetensors" in refused(bare)


def test_two_tensors_of_one_name(bare: Path) -> None:
    """JSON lets a name appear twice; what is read must be what was digested."""
    file = bare / "model.safetensors"
    header, payload = read_shard(file)
    other = {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}
    text = json.dumps(header)[:-1] + f', "matrix/inner/codes": {json.dumps(other)}}}'
    write_shard(file, text.encode(), payload)
    refused(bare)


def test_bytes_hidden_between_tensors(bare: Path) -> None:
    file = bare / "model.safetensors"
    header, payload = read_shard(file)
    write_shard(file, header, payload + b"hidden")
    refused(bare)


def test_shared_links(damaged: Path) -> None:
    def change(value: object) -> Callable[[dict[str, Any]], None]:
        return lambda manifest: manifest["matrices"]["m8"].update(shared=value)

    for value in ({}, {"table": "m0/values"}, {"table": 3}, {"table": None}, [], None, "table", {"table": "nowhere"}):
        edit(damaged, change(value))
        refused(damaged)
    edit(damaged, lambda manifest: manifest["matrices"]["m8"].pop("shared"))
    refused(damaged)

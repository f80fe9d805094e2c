"""Files: read by the package gguf, copied pair by pair, and refused where they are not sound."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tersor.errors import ModelError
from tersor.gguf import file, metadata
from tersor.gguf.file import Entry

PAIRS = [metadata.text("general.architecture", "llama"), metadata.count("llama.block_count", 2),
         metadata.real("llama.rope.freq_base", 1e4), metadata.flag("tokenizer.ggml.add_bos_token", False),
         metadata.texts("tokenizer.ggml.tokens", ["a", "ü", ""]),
         metadata.numbers("tokenizer.ggml.token_type", metadata.I32, [1, 3, -5])]
ENTRIES = [Entry("a.weight", (3, 5), 0), Entry("b.bias", (7,), 0), Entry("c.weight", (2, 3, 4), 1)]
NUMBERS = [torch.randn(3, 5), torch.randn(7), torch.randn(2, 3, 4).half()]
SIZES = [60, 28, 48]


def write(path: Path) -> Path:
    held = dict(zip(("a.weight", "b.bias", "c.weight"), NUMBERS, strict=True))
    nbytes = file.write(path, PAIRS, ENTRIES, SIZES, lambda entry: [held[entry.name].reshape(-1).view(torch.uint8)])
    assert nbytes == path.stat().st_size == len(file.header(PAIRS, ENTRIES, SIZES)) + 64 + 32 + 64
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = file.read(write(tmp_path / "m.gguf"))
    assert list(found.pairs) == PAIRS
    assert [pair.value() for pair in found.pairs][3:] == [False, ["a", "ü", ""], [1, 3, -5]]
    for entry, given, size, numbers in zip(found.entries, ENTRIES, SIZES, NUMBERS, strict=True):
        assert (entry.name, entry.shape, entry.number) == (given.name, given.shape, given.number)
        assert torch.equal(found.bytes_of(entry, size).view(numbers.dtype).reshape(numbers.shape), numbers)


def test_the_package_gguf_reads_it(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "m.gguf"))
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "ü", ""]
    assert reader.fields["llama.block_count"].contents() == 2
    for tensor, numbers in zip(reader.tensors, NUMBERS, strict=True):
        assert np.array_equal(tensor.data, numbers.numpy())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in range(0, len(file.header(PAIRS, ENTRIES, SIZES)) - 40, 7):
        bad.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="bad"):
            file.read(bad)
    for place in range(4, 300, 3):  # whatever a byte turns into, nothing but a ModelError comes of it
        bad.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with contextlib.suppress(ModelError):
            found = file.read(bad)
            for entry, size in zip(found.entries, SIZES, strict=True):
                found.bytes_of(entry, size)


def test_data_beyond_the_end_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    found = file.read(path)
    with pytest.raises(ModelError, match=r"c\.weight.*beyond"):
        found.bytes_of(found.entries[-1], 48)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def full(entry: Entry) -> list[torch.Tensor]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space.*m\.gguf"):
        file.write(tmp_path / "m.gguf", PAIRS, ENTRIES, SIZES, full)
    assert list(tmp_path.iterdir()) == []

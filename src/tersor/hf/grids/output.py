"""The directory that is written: packed matrices, what stays dense, and a configuration that says so."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from tersor.files import file_digest, sync
from tersor.hf.grids.config import config_json
from tersor.hf.grids.desk import GridDesk
from tersor.hf.grids.encodable import module_of
from tersor.hf.grids.plan import tensors
from tersor.hf.models.dense import write_shards
from tersor.hf.models.source import Source
from tersor.store.manifest import INDEX


def write(source: Source, desk: GridDesk, folder: Path) -> None:
    """Write a directory, in place of one that a killed run has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    picks = desk.job.picks
    modules = {module_of(name): name for name in picks}
    held: dict[str, dict[str, Tensor]] = {}

    def read(name: str) -> Tensor:
        module, _, key = name.rpartition(".")
        if module not in modules or key == "bias":
            return source.tensor(name)
        if module not in held:
            held.clear()
            held[module] = desk.tensors(modules[module])
        return held[module][key]

    write_shards(tensors(source, picks), read, folder)
    (folder / "config.json").write_bytes(config_json(source, picks))
    for name, file in source.companions().items():
        shutil.copyfile(file, folder / name)
    source.check_unchanged()
    for child in (*folder.iterdir(), folder):
        sync(child)


def counted(folder: Path) -> list[Path]:
    """Return the files whose bytes count: shards, their index if any, and the configuration."""
    return sorted(file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name in
                  (INDEX, "config.json"))


def nbytes(folder: Path) -> int:
    """Return the bytes that count."""
    return sum(file.stat().st_size for file in counted(folder))


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the shards."""
    return {file.name: file_digest(file) for file in counted(folder) if file.suffix == ".safetensors"}

"""Where a model's dense tensors come from: each is read, and converted where need be, when it is asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tersor.contract.checks import check_matrix
from tersor.errors import ModelError
from tersor.files import read_json
from tersor.hf.models import gguf_file, staging
from tersor.hf.models.checkpoint import Account, Held, account
from tersor.hf.models.classes import model_class, takes_text
from tersor.hf.models.ledger import Ledger
from tersor.hf.models.matrices import Matrix, Parts, empty_model, read_config, walk
from tersor.hf.models.places import Origin, locate
from tersor.hf.models.quantized import dense as dequantized
from tersor.hf.models.quantized import settings
from tersor.hf.models.staging import WEIGHT_SUFFIXES
from tersor.hf.models.trial import Trial, trial
from tersor.payload.layout import TensorSpec
from tersor.store.manifest import FORMAT_VERSION, file_digest

ADAPTER = "adapter_config.json"
DIGESTS = 4  # files whose digests are computed at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A dense model, opened.

    Attributes
    ----------
    path : Path
        What the user named: a directory, or a .gguf file.
    folder : Path
        Directory that holds configuration and tokenizer: `path`, or where those of a .gguf file were written.
    config : PretrainedConfig
    layout : Parts
        What is compressed, what is stored as it is (tensors that no parameter takes, too), and what is tied.
    account : Account
        Where every tensor of the checkpoint lies.
    tried : Trial
        Whether the class computes with encoded weights, and which of them must stay dense.
    left_dense : mapping of str to str
        Parameters that stay dense without having been asked for, and why.
    left_out : mapping of str to str
        Keys that the user asked to leave out, and why.
    seen : mapping of Path to tuple
        The files, as they were when they were opened: inode, size and time of change.
    proofs : list
        That the model runs block by block (`streamed.Proof`): none before it was first run so.
    """

    path: Path
    folder: Path
    config: PretrainedConfig
    layout: Parts
    account: Account
    tried: Trial
    left_dense: Mapping[str, str]
    left_out: Mapping[str, str]
    seen: Mapping[Path, tuple[int, int, int]]
    proofs: list[Any] = dataclasses.field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor in its own dtype; dequantized, and put together, where the checkpoint stores it otherwise."""
        return self._checked(name).read()

    def matrix(self, matrix: Matrix) -> Tensor:
        """Read one matrix (out, in); only its slice of a stack."""
        origin = self._checked(matrix.parameter)
        return matrix.take(origin.read()) if matrix.index is None else origin.read(matrix.index)

    def _checked(self, name: str) -> Origin:
        """Return what a tensor is made of, if its files are those that were opened."""
        origin = self.account.origin(name)
        self.check_unchanged({place.file for place in origin.places})
        return origin

    def check_unchanged(self, files: Iterable[Path] | None = None) -> None:
        """Raise `ModelError` if a file of the model, or one of some, is no longer the one that was opened."""
        for file in self.seen if files is None else files:
            if _state(file) != self.seen[file]:
                raise ModelError(f"{file} has changed since it was opened; run again once the model is no longer being "
                                 "written")

    @functools.cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The stored dtype of every tensor."""
        return {name: self.account.origin(name).dtype for name in self.layout.parameters}

    @functools.cached_property
    def ledger(self) -> Ledger:
        """What becomes of every tensor of the checkpoint."""
        return Ledger.of(self.layout, self.account, self.left_out, self.original_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of a directory that holds the model as it is: of the files of a checkpoint, or of a dense .gguf."""
        return self.original_nbytes if self.path.is_dir() else sum(
            TensorSpec(origin.shape, origin.dtype).nbytes for origin in self.account.located.values())

    @functools.cached_property
    def _files(self) -> list[Path]:
        return sorted({place.file for place in self.account.places})

    @property
    def original_nbytes(self) -> int:
        """Bytes of what the user gave: the .gguf file, or the checkpoint's files."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def elements(self) -> int:
        """Number of stored numbers: parameters, and what no parameter takes."""
        matrices = sum(m.shape[0] * m.shape[1] for m in self.layout.matrices.values())
        return matrices + sum(size.numel() for size in self.layout.plain.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights as the user gave them; read once."""
        return _digest(self._files if self.path.is_file() else [self.folder / "config.json", *self._files])

    @functools.cached_property
    def fingerprints(self) -> Mapping[str, str]:
        """What the manifest says of the source: its fingerprint."""
        found = {"source_sha256": self.fingerprint}
        self.check_unchanged()
        return found

    def config_json(self) -> dict[str, Any]:
        """Return the configuration as stored."""
        found = read_json(self.folder / "config.json")
        if not isinstance(found, dict):
            raise ModelError(f"{self.path}: config.json holds no JSON object")
        return found

    def companions(self) -> dict[str, Path]:
        """Return tokenizer and other small files that go along, by name."""
        return staging.companions(self.folder)

    @functools.cached_property
    def companion_digests(self) -> Mapping[str, str]:
        """SHA-256 of the companions; read once."""
        found = {name: file_digest(file) for name, file in self.companions().items()}
        self.check_unchanged()
        return found

    def stored_files(self) -> dict[str, bytes | Path]:
        """Return what lies beside the shards of a compressed model: a configuration that says so, and companions."""
        self.check_unchanged()
        config = self.config_json()
        config["architectures"] = [model_class(self.config).__name__]
        config["quantization_config"] = {"quant_method": "tersor", "format_version": FORMAT_VERSION}
        return {"config.json": json.dumps(config, indent=1).encode(), **self.companions()}


def made_from(provenance: Mapping[str, Any], source: Source) -> bool:
    """Return whether a store says that it was made from this source; one that says nothing is believed."""
    told = {provenance[key] for key in ("source_sha256", "converted_sha256") if key in provenance}
    return not told or bool(told & set(source.fingerprints.values()))


def _state(file: Path) -> tuple[int, int, int]:
    """Return what changes with a file: inode, size, time of its last change; zeros if it is gone."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 over files: a configuration as it is, weights by their own digests."""
    def digest(file: Path) -> bytes:
        return file.read_bytes() if file.name == "config.json" else bytes.fromhex(file_digest(file))

    sha = hashlib.sha256()
    with ThreadPoolExecutor(DIGESTS) as pool:
        for part in pool.map(digest, files):
            sha.update(part)
    return sha.hexdigest()


def open_source(path: Path, staged: Path, *, dense: Sequence[str] | None = (), leave_out: Sequence[str] = ()) -> Source:
    """Open a transformers directory or a .gguf file.

    Nothing is loaded: tensors are read, dequantized and put together one at a time, when they are asked for. The
    configuration and the tokenizer of a .gguf file are written to `staged`.

    Parameters
    ----------
    dense : sequence of str or None
        Shell patterns of parameters that stay as they are; None: of a model that reads text, what text does not reach,
        such as a vision tower.
    leave_out : sequence of str
        Shell patterns of tensors to leave out, among those that no parameter takes; the others are carried along.

    Raises
    ------
    ModelError
        If there is no usable model; says what is missing.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    seen = {file: _state(file) for file in _watched(path)}
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: expected a model directory or a .gguf file")
        folder = gguf_file.stage(path, staged)
        config = read_config(folder)
    else:
        folder, config = path, read_config(path)
        _check_folder(path)
    held = None if path.is_file() else _held(path, config)
    model = empty_model(config)
    layout = walk(model)
    if not layout.matrices:
        raise ModelError(f"{path}: a {type(model).__name__} has no matrix to compress")
    found = account(path, held or gguf_file.held(path, model), model, layout)
    tried = trial(config)
    must = {name: f"its module calls {said} on it" for name, said in tried.dense.items()}
    for tower in tried.unreached if dense is None and takes_text(type(model)) else ():
        own = {matrix.parameter for matrix in layout.matrices.values() if matrix.parameter.startswith(f"{tower}.")}
        must |= dict.fromkeys(own, f"text does not reach {tower}; --dense says otherwise")
    layout, left_out = _asked(layout, found, (must, dense or ()), leave_out)
    if not layout.matrices:
        raise ModelError(f"{path}: no matrix of this {type(model).__name__} is left to compress; --dense PATTERN says "
                         "which stay as they are, and --dense '' that none do")
    source = Source(path, folder, config, layout, found, tried, must, left_out, seen)
    source.check_unchanged()
    return source


def _held(path: Path, config: PretrainedConfig) -> Held:
    """Return what the files of a directory hold, dequantized; the configuration then says no more that it is not."""
    tensors, aside = dequantized(locate(path), config, path)
    if settings(config):
        delattr(config, "quantization_config")
    return Held(tensors, aside)


def _check_folder(path: Path) -> None:
    if (path / ADAPTER).exists():
        raise ModelError(f"{path}: holds {ADAPTER}, with which transformers loads an adapter on top; merge it into the "
                         "weights first, or move it away")
    if not any(f.suffix in WEIGHT_SUFFIXES for f in path.iterdir()):
        raise ModelError(f"{path}: config.json but no weights (.safetensors)")


def _watched(path: Path) -> list[Path]:
    """Return the files that may not change while a model is open."""
    return [path] if path.is_file() else [f for f in sorted(path.iterdir()) if f.is_file() and f.name != "README.md"
                                          and not f.name.startswith(".")]


def _asked(layout: Parts, account: Account, dense: tuple[Collection[str], Sequence[str]],
           leave_out: Sequence[str]) -> tuple[Parts, dict[str, str]]:
    """Return the parts as they are wanted, extra tensors among them, and the reasons for those left out.

    Parameters
    ----------
    dense : (collection of str, sequence of str)
        Parameters that must stay as they are, and patterns of those that the user wants so; an empty one is for none.
    """
    layout = layout.without(set(layout.parameters) - set(account.located))  # what the class makes by itself
    must, wanted = dense
    layout = layout.leaving({*must, *(name for pattern in wanted if pattern for name in layout.matching(pattern))})
    left_out = {key: f"asked for by --leave-out {pattern}" for pattern in leave_out
                for key in account.matching(pattern)}
    carried = {key: torch.Size(place.shape) for key, place in account.extra.items() if key not in left_out}
    return dataclasses.replace(layout, plain={**layout.plain, **carried}), left_out


def read_matrix(source: Source, matrix: Matrix, device: str) -> Tensor:
    """Read one matrix of a source to `device`, checked for NaN and infinity by name."""
    tensor = source.matrix(matrix).to(device)
    check_matrix(tensor, matrix.name)
    return tensor

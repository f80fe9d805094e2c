"""Where a model's dense tensors come from: read one at a time from safetensors, or staged when they need converting."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from tersor.contract.checks import check_matrix
from tersor.errors import ModelError
from tersor.files import read_json, save_tensors
from tersor.hf.models import checkpoint
from tersor.hf.models.matrices import Matrix, Parts, check_class, empty_model, quiet, read_config, refused, walk
from tersor.store import FORMAT_VERSION, INDEX, MANIFEST

REPORT = "tersor-report.json"  # what a compressed model says of its matrices
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_OWN_FILES = ("config.json", MANIFEST, REPORT)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A dense model, opened.

    Attributes
    ----------
    path : Path
        What the user named: a directory, or a .gguf file.
    folder : Path
        Directory that holds configuration and safetensors: `path`, or where it was staged.
    config : PretrainedConfig
    layout : Parts
    locations : mapping of str to (Path, str)
        File and key of every stored tensor.
    """

    path: Path
    folder: Path
    config: PretrainedConfig
    layout: Parts
    locations: Mapping[str, tuple[Path, str]]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor in its own dtype."""
        file, key = self.locations[name]
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(key)

    def matrix(self, matrix: Matrix) -> Tensor:
        """Read one matrix (out, in); only its slice of a stack."""
        file, key = self.locations[matrix.parameter]
        with safe_open(file, framework="pt") as handle:
            if matrix.index is not None:
                return handle.get_slice(key)[matrix.index]
            return matrix.take(handle.get_tensor(key))

    @functools.cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The stored dtype of every tensor; looked up once."""
        found = {}
        for name, (file, key) in self.locations.items():
            with safe_open(file, framework="pt") as handle:
                kind = handle.get_slice(key).get_dtype()
                found[name] = checkpoint.FLOATS[kind] if kind in checkpoint.FLOATS else handle.get_tensor(key).dtype
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the dense safetensors files, staged ones included."""
        return sum(file.stat().st_size for file in {file for file, _ in self.locations.values()})

    @property
    def original_nbytes(self) -> int:
        """Bytes of what the user gave: the .gguf file, or the dense safetensors files."""
        return self.path.stat().st_size if self.path.is_file() else self.nbytes

    @property
    def elements(self) -> int:
        """Number of parameters."""
        matrices = sum(m.shape[0] * m.shape[1] for m in self.layout.matrices.values())
        return matrices + sum(size.numel() for size in self.layout.plain.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights; read once."""
        sha = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted({file for file, _ in self.locations.values()}):
            with file.open("rb") as handle:
                sha.update(hashlib.file_digest(handle, "sha256").digest())
        return sha.hexdigest()

    def config_json(self) -> dict[str, Any]:
        """Return the configuration as stored."""
        found = read_json(self.folder / "config.json")
        if not isinstance(found, dict):
            raise ModelError(f"{self.path}: config.json holds no JSON object")
        return found

    def companions(self) -> dict[str, Path]:
        """Return tokenizer and other small files that go along, by name."""
        skip = (*_OWN_FILES, INDEX, "README.md", ".gitattributes")
        return {f.name: f for f in sorted(self.folder.iterdir())
                if f.is_file() and f.suffix not in _WEIGHT_SUFFIXES and f.name not in skip
                and not f.name.endswith(".index.json") and not f.name.startswith(".")}

    def stored_files(self) -> dict[str, bytes | Path]:
        """Return what lies beside the shards of a compressed model: a configuration that says so, and companions."""
        config = self.config_json()
        config["quantization_config"] = {"quant_method": "tersor", "format_version": FORMAT_VERSION}
        return {"config.json": json.dumps(config, indent=1).encode(), **self.companions()}


def open_source(path: Path, staging: Path) -> Source:
    """Open a transformers directory or a .gguf file.

    Tensors are read straight from safetensors where the checkpoint stores the model's own parameters; a checkpoint that
    transformers must convert (GGUF, pickles, experts stored one by one) is loaded once and staged in `staging`.

    Raises
    ------
    ModelError
        If there is no usable model; says what is missing.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: expected a model directory or a .gguf file")
        return _staged(path, staging)
    config = read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{path}: already quantized ({_method(config)}); give Tersor the original model")
    if not any(f.suffix in _WEIGHT_SUFFIXES for f in path.iterdir()):
        raise ModelError(f"{path}: config.json but no weights (.safetensors)")
    return _open_folder(path, path) or _staged(path, staging)


def _staged(path: Path, staging: Path) -> Source:
    source = _open_folder(path, _stage(path, staging))
    assert source is not None, "a staged checkpoint stores the model's own parameters"
    return source


def _method(config: PretrainedConfig) -> str:
    found = config.quantization_config
    return str(found.get("quant_method", "?") if isinstance(found, dict) else found.quant_method)


def _open_folder(path: Path, folder: Path) -> Source | None:
    """Open a folder whose safetensors hold the model's own parameters; None where they need converting."""
    config = read_config(folder)
    model = empty_model(config)
    check_class(path, config, model)
    layout = walk(model)
    locations = checkpoint.account(folder, model, layout)
    return None if locations is None else Source(path, folder, config, layout, locations)


def _stage(path: Path, staging: Path) -> Path:
    """Load a checkpoint through transformers and write its parameters under their own names."""
    folder, gguf = (path.parent, path.name) if path.is_file() else (path, None)
    extra = {"gguf_file": gguf, "dtype": torch.float32} if gguf else {"dtype": "auto"}
    with refused(f"{path}: transformers cannot load this checkpoint"), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                           output_loading_info=True, **extra)
    model, told = loaded
    tensors = checkpoint.converted(path, model, told)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_tensors(tensors, staging / "model.safetensors")
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    (staging / "config.json").write_text(json.dumps(config, indent=1, default=str))
    if gguf:
        with refused(f"{path}: transformers cannot read its tokenizer"), quiet():
            AutoTokenizer.from_pretrained(folder, gguf_file=gguf, local_files_only=True,
                                          trust_remote_code=False).save_pretrained(staging)
    else:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".model") and file.name != "config.json" and (
                    not file.name.endswith(".index.json")):
                shutil.copyfile(file, staging / file.name)
    return staging


def load_dense(source: Source, device: str = "cpu") -> PreTrainedModel:
    """Load the dense model of a source: in its own dtype on a GPU, in float32 on a CPU."""
    dtype = torch.float32 if device == "cpu" else "auto"
    with refused(f"{source.path}: transformers cannot load this checkpoint"), quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, local_files_only=True,
                                                          trust_remote_code=False)
    return model.to(device).eval()


def read_matrix(source: Source, matrix: Matrix, device: str) -> Tensor:
    """Read one matrix of a source to `device`, checked for NaN and infinity by name."""
    tensor = source.matrix(matrix).to(device)
    check_matrix(tensor, matrix.name)
    return tensor

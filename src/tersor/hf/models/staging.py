"""Checkpoints that transformers must convert (GGUF, pickles, experts stored one by one): loaded once, and staged.

A conversion renames, stacks and splits. So numbers are counted: those in the files are those of the model, but for
what repeats a tied parameter, what the class makes by itself, and what no parameter takes, which is carried along.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tersor.errors import ModelError
from tersor.files import read_json, save_tensors
from tersor.hf.models import checkpoint
from tersor.hf.models.checkpoint import Place, spellings
from tersor.hf.models.classes import model_class
from tersor.hf.models.gguf_file import left_over
from tersor.hf.models.matrices import quiet, read_config, refused, unsaved
from tersor.store.manifest import INDEX, MANIFEST

REPORT = "tersor-report.json"  # what a compressed model says of its matrices
OWN_FILES = ("config.json", MANIFEST, REPORT)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def companions(folder: Path) -> dict[str, Path]:
    """Return tokenizer and other small files that go along with a model, by name."""
    skip = (*OWN_FILES, INDEX, "README.md", ".gitattributes")
    return {f.name: f for f in sorted(folder.iterdir())
            if f.is_file() and f.suffix not in WEIGHT_SUFFIXES and f.name not in skip
            and not f.name.endswith(".index.json") and not f.name.startswith(".")}


def stage(path: Path, staging: Path) -> Path:
    """Load a checkpoint through transformers and write its parameters, and what it holds besides, to `staging`.

    Raises
    ------
    ModelError
        If transformers cannot load it, fills a parameter in, or drops numbers on the way.
    """
    gguf = path.is_file()
    files = {} if gguf else files_of(path)
    floats = {place.dtype for place in files.values() if place.dtype.is_floating_point}
    model, told = _load(path, _dtype(floats))
    tensors = _parameters(path, model, told)
    for name in unsaved(model) - set(files):
        tensors.pop(name, None)
    if gguf:
        tensors |= left_over(path, tensors, sum(tensor.numel() for tensor in tensors.values()))
    else:
        tensors = {name: _narrowed(tensor, floats) for name, tensor in tensors.items()}
        extra = _extra(path, model, told, files)
        _count(path, model, files, tensors, extra)
        tensors |= _read(extra, files)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_tensors(tensors, staging / checkpoint.SINGLE)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config.pop("quantization_config", None)
    (staging / "config.json").write_text(json.dumps(config, indent=1, default=str))
    _companions(path, staging)
    return staging


def _load(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    folder, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    with refused(f"{path}: transformers cannot load this checkpoint"), quiet():
        kind: Any = AutoModelForCausalLM if path.is_file() else model_class(read_config(path))
        loaded: Any = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, dtype=dtype,
                                           **extra)
    return loaded


def _dtype(floats: Set[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds all of these without loss."""
    if len(floats) == 1:
        return next(iter(floats))
    return torch.float64 if torch.float64 in floats else torch.float32


def _narrowed(tensor: Tensor, floats: Set[torch.dtype]) -> Tensor:
    """Return a parameter in the narrowest of a checkpoint's dtypes that holds it exactly: the one it came from."""
    if tensor.is_floating_point():
        for dtype in sorted(floats, key=lambda dtype: (dtype.itemsize, str(dtype))):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return tensor.to(dtype)
    return tensor


def _parameters(path: Path, model: PreTrainedModel, told: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parameters of a loaded model under their own names, if each came from the checkpoint."""
    ties = dict(model.all_tied_weights_keys)
    missing = sorted(set(told["missing_keys"]) - set(ties))
    if missing:
        raise ModelError(f"{path}: of the parameters of {type(model).__name__}, {len(missing)} are missing, such as "
                         f"'{missing[0]}'; transformers would fill them with random numbers")
    if told["mismatched_keys"]:
        raise ModelError(f"{path}: {sorted(map(str, told['mismatched_keys']))[0]} is not of the shape that config.json "
                         "makes it")
    state = model.state_dict()
    for name, origin in ties.items():
        if name in state and not torch.equal(state[name], state[origin]):
            raise ModelError(f"{path}: holds a '{name}' of its own, but config.json ties it to '{origin}'; set "
                             "tie_word_embeddings to what the model was trained with")
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in ties}


def files_of(path: Path) -> dict[str, Place]:
    """Return the place of every tensor of a checkpoint's safetensors files, or of its pickles."""
    if any(path.glob("*.safetensors")):
        return checkpoint.locate(path)
    index = path / PICKLE_INDEX
    with refused(f"{path}: no checkpoint that torch can read"):
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [PICKLE]
        return {key: Place(path / name, key, tuple(tensor.shape), tensor.dtype)
                for name in names for key, tensor in _unpickle(path / name, "meta").items()
                if isinstance(tensor, Tensor)}


def _unpickle(file: Path, device: str) -> Mapping[str, Any]:
    held = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(held, Mapping):
        raise TypeError(f"{file.name} holds a {type(held).__name__}; expected tensors by name")
    return held


def _extra(path: Path, model: PreTrainedModel, told: Mapping[str, Any], files: Mapping[str, Place]) -> list[str]:
    """Return the keys that no parameter takes, but for those of ties and of what the class makes by itself."""
    known = set(model.all_tied_weights_keys) | {name for name, _ in model.named_buffers()}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    dropped = {key for key in files if any(re.search(pattern, key) for pattern in patterns)}
    keys = sorted(key for key in {*told["unexpected_keys"], *dropped}
                  if not known & set(spellings(key, model.base_model_prefix)))
    renamed = [key for key in keys if key not in files]
    if renamed:
        raise ModelError(f"{path}: no parameter of {type(model).__name__} takes {len(renamed)} of its tensors, which "
                         f"transformers calls '{renamed[0]}' and so on; remove them first if they are not needed")
    return keys


def _count(path: Path, model: PreTrainedModel, files: Mapping[str, Place], tensors: Mapping[str, Tensor],
           extra: Iterable[str]) -> None:
    """Raise `ModelError` unless all numbers of the files are in the parameters, or known to be nobody's own."""
    known = set(model.all_tied_weights_keys) | ({name for name, _ in model.named_buffers()} - set(tensors))
    left_out = {key for key in files if known & set(spellings(key, model.base_model_prefix))} | set(extra)
    held = sum(math.prod(place.shape) for key, place in files.items() if key not in left_out)
    taken = sum(tensor.numel() for tensor in tensors.values())
    if held != taken:
        raise ModelError(f"{path}: its files hold {held} numbers for the parameters of a {type(model).__name__}, which "
                         f"has {taken} after transformers has converted them; none may be lost or made up")


def _read(keys: Iterable[str], files: Mapping[str, Place]) -> dict[str, Tensor]:
    """Read tensors under the checkpoint's own keys."""
    return {key: checkpoint.read(files[key]) if files[key].file.suffix == ".safetensors" else
            _unpickle(files[key].file, "cpu")[key].contiguous() for key in keys}


def _companions(path: Path, staging: Path) -> None:
    if path.is_file():
        with refused(f"{path}: transformers cannot read its tokenizer"), quiet():
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True,
                                          trust_remote_code=False).save_pretrained(staging)
        return
    for name, file in companions(path).items():
        shutil.copyfile(file, staging / name)

"""Checkpoints that transformers must convert (GGUF, pickles, experts stored one by one): loaded once, and staged.

A conversion renames, stacks and splits. So numbers are counted: those in the files are those of the model, but for
what repeats a tied parameter, what the class makes by itself, and what no parameter takes, which is carried along.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tersor.errors import ModelError
from tersor.files import read_json, save_tensors
from tersor.hf.models import checkpoint
from tersor.hf.models.checkpoint import Place, spellings
from tersor.hf.models.classes import model_class
from tersor.hf.models.matrices import FOREIGN, quiet, read_config, unsaved

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


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
    if not gguf:
        tensors = {name: _narrowed(tensor, floats) for name, tensor in tensors.items()}
        extra = _extra(path, model, told, files)
        _count(path, model, files, tensors, extra)
        tensors.update(_read(extra, files))
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
    try:
        kind: Any = AutoModelForCausalLM if path.is_file() else model_class(read_config(path))
        with quiet():
            loaded: Any = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, dtype=dtype,
                                               **extra)
    except (*FOREIGN, UnpicklingError, BadZipFile, EOFError, struct.error) as error:
        raise ModelError(f"{path}: transformers cannot load this checkpoint: {str(error).strip()[:300]}") from error
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
    try:
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [PICKLE]
        return {key: Place(path / name, key, tuple(tensor.shape), tensor.dtype)
                for name in names for key, tensor in _unpickle(path / name, "meta").items()
                if isinstance(tensor, Tensor)}
    except (UnpicklingError, BadZipFile, EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError,
            AttributeError) as error:
        raise ModelError(f"{path}: no checkpoint that torch can read: {str(error).strip()[:200]}") from error


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
        try:
            with quiet():
                AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name,
                                              local_files_only=True, trust_remote_code=False).save_pretrained(staging)
        except FOREIGN as error:
            raise ModelError(f"{path}: transformers cannot read its tokenizer: {str(error).strip()[:200]}") from error
        return
    for file in path.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and file.name != "config.json" and (
                not file.name.endswith(".index.json")):
            shutil.copyfile(file, staging / file.name)

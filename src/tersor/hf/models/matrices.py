"""From a model's modules to its matrices: by tensors and shapes, never by lists of architectures."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tersor.errors import ModelError, TersorError

# What transformers and what it calls raise on files that are not as they expect; they promise no types
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
               AssertionError, ImportError, EOFError, SyntaxError, MemoryError, StrictDataclassError,
               pickle.PickleError, struct.error, zipfile.BadZipFile)

MOST_PARTS = 1024  # layers, or experts of one; several times those of any model
MIN_SIDE = 8  # a matrix with fewer rows or columns is not worth compressing


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix of a model, in the codecs' orientation.

    Attributes
    ----------
    name : str
        The parameter's name; `parameter/i` for slice i of a stack.
    parameter : str
    index : int or None
        Slice of a stack of matrices, such as fused experts.
    shape : (int, int)
        (out, in).
    kind : str
        `"linear"`, `"conv1d"` (stored transposed), `"embedding"`, `"stack"` or `"view"` (a linear or embedding whose
        class computes in its own way).
    """

    name: str
    parameter: str
    index: int | None
    shape: tuple[int, int]
    kind: str

    def take(self, parameter: Tensor) -> Tensor:
        """Return this matrix from the whole parameter."""
        if self.index is not None:
            return parameter[self.index]
        return parameter.T if self.kind == "conv1d" else parameter


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What a model is made of: its matrices, and everything else that a checkpoint stores.

    Attributes
    ----------
    matrices : mapping of str to Matrix
    plain : mapping of str to torch.Size
        Norms, biases, persistent buffers and small or odd-shaped tensors, stored as they are.
    tied : mapping of str to str
        Parameters that are not stored because they are another one: name to source.
    """

    matrices: Mapping[str, Matrix]
    plain: Mapping[str, torch.Size]
    tied: Mapping[str, str]

    @property
    def parameters(self) -> list[str]:
        """Names of the tensors that a dense checkpoint of this model stores."""
        return list(dict.fromkeys([m.parameter for m in self.matrices.values()] + list(self.plain)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and libraries' progress bars out of the way, then restore them."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn what transformers raises on unsound files into `ModelError`; nothing else belongs into the block."""
    try:
        yield
    except TersorError:
        raise
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):  # the tokenizers raise the bare class
            raise
        raise ModelError(f"{what}: {_line(error)}") from error


def read_config(path: Path) -> PretrainedConfig:
    """Read a model directory's configuration.

    Raises
    ------
    ModelError
        If there is no readable configuration of a known architecture.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; expected the directory of a transformers model, or a .gguf file")
    with refused(f"{path}: transformers cannot read config.json"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        claimed = list(_claims(config.to_dict()))
    for name, count in claimed:
        if count > MOST_PARTS:
            raise ModelError(f"{path}: config.json says {name}: {count}; at most {MOST_PARTS} are taken")
    return config


def _claims(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the numbers of layers and experts that a configuration asks for: a class builds as many modules."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _claims(value)
        elif isinstance(value, int) and re.search(r"^(num|n)_.*(layer|expert)|^(?!max_).*_layers$", str(name)):
            yield str(name), value


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a configuration on the meta device: shapes without memory.

    Raises
    ------
    ModelError
        If the configuration has no causal language model.
    """
    with refused(f"'{config.model_type}' is no causal language model that transformers can build"), quiet(), (
            torch.device("meta")):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_class(path: Path, config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Raise `ModelError` unless the model is of the class that config.json names: no part is left out or invented."""
    given = config.architectures or [type(model).__name__]
    if not isinstance(given, (list, tuple)) or not isinstance(given[0], str):
        raise ModelError(f"{path}: config.json: architectures must be a list of class names, found {given!r}")
    named = given[0]
    if named != type(model).__name__:
        raise ModelError(f"{path}: config.json names a {named}; as a causal language model it would be a "
                         f"{type(model).__name__}, which has other parameters; only causal language models are taken")


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def walk(model: PreTrainedModel) -> Parts:
    """Sort every stored tensor of a (meta) model into matrices, plain tensors and tied names."""
    tied = dict(model.all_tied_weights_keys)
    owners = {f"{name}.{key}" if name else key: (module, key) for name, module in model.named_modules()
              for key, _ in module.named_parameters(recurse=False)}
    matrices: dict[str, Matrix] = {}
    plain: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        found = _matrices(name, tensor, *owners.get(name, (None, "")))
        if not found:
            plain[name] = tensor.shape
        matrices.update({m.name: m for m in found})
    return Parts(matrices, plain, tied)


def _matrices(name: str, tensor: Tensor, owner: nn.Module | None, key: str) -> list[Matrix]:
    if owner is None or not tensor.is_floating_point() or min(tensor.shape[-2:], default=0) < MIN_SIDE:
        return []
    rows, columns = (tensor.shape[-2], tensor.shape[-1]) if tensor.ndim >= 2 else (0, 0)
    if tensor.ndim == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
        return [Matrix(f"{name}/{i}", name, i, (rows, columns), "stack") for i in range(tensor.shape[0])]
    if tensor.ndim != 2 or key != "weight":
        return []
    if isinstance(owner, Conv1D):
        return [Matrix(name, name, None, (columns, rows), "conv1d")]
    if isinstance(owner, nn.Linear):
        plain_forward = type(owner).forward is nn.Linear.forward
        return [Matrix(name, name, None, (rows, columns), "linear" if plain_forward else "view")]
    if isinstance(owner, nn.Embedding):
        plain_forward = type(owner).forward is nn.Embedding.forward
        return [Matrix(name, name, None, (rows, columns), "embedding" if plain_forward else "view")]
    return []

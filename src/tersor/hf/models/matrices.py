"""From a model's modules to its matrices: by tensors and shapes, never by lists of architectures."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import io
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from pickle import PickleError
from typing import Any
from zipfile import BadZipFile

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tersor.errors import ModelError, TersorError
from tersor.hf.models.classes import model_class

MIN_SIDE = 8  # a matrix with fewer rows or columns is not worth compressing
# what transformers may raise at a configuration or a checkpoint that it cannot use
FOREIGN = (ArithmeticError, AssertionError, AttributeError, BadZipFile, EOFError, ImportError, LookupError, MemoryError,
           OSError, PickleError, RuntimeError, StrictDataclassError, SyntaxError, TypeError, ValueError, struct.error)
MOST_PARTS = 1024  # layers, or experts of one; several times those of any model


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

    def leaving(self, dense: Iterable[str]) -> Parts:
        """Return the same parts with the matrices of some parameters among what is stored as it is."""
        kept = set(dense)
        shapes: dict[str, torch.Size] = {}
        for m in self.matrices.values():
            if m.parameter in kept:
                shape = m.shape[::-1] if m.kind == "conv1d" else m.shape
                shapes[m.parameter] = torch.Size(shape if m.index is None else (m.index + 1, *shape))
        matrices = {name: m for name, m in self.matrices.items() if m.parameter not in kept}
        return Parts(matrices, {**self.plain, **shapes}, self.tied)

    @property
    def parameters(self) -> list[str]:
        """Names of the tensors that a dense checkpoint of this model stores."""
        return list(dict.fromkeys([m.parameter for m in self.matrices.values()] + list(self.plain)))

    def without(self, names: Set[str]) -> Parts:
        """Return these parts less some parameters."""
        return Parts({name: m for name, m in self.matrices.items() if m.parameter not in names},
                     {name: size for name, size in self.plain.items() if name not in names}, self.tied)

    def matching(self, pattern: str) -> list[str]:
        """Return the parameters of matrices that a shell pattern matches.

        Raises
        ------
        ModelError
            If there is none.
        """
        found = [name for name in self.parameters if name not in self.plain and fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise ModelError(f"--dense '{pattern}' matches no matrix of the model; names look like "
                             f"'{next(iter(self.matrices), 'model.layers.0.mlp.up_proj.weight')}'")
        return found


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
        if type(error) is not Exception and not isinstance(error, FOREIGN):  # the tokenizers raise the bare class
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
    """Return the model of a configuration's own class on the meta device: shapes without memory.

    Raises
    ------
    ModelError
        If transformers cannot build it.
    """
    kind = model_class(config)
    with refused(f"transformers cannot build a {kind.__name__} from config.json"), quiet(), torch.device("meta"):
        return kind(config)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def unsaved(model: PreTrainedModel) -> set[str]:
    """Return the parameters that a class makes by itself and does not save, such as tables of sinusoids."""
    patterns = model._keys_to_ignore_on_save or ()
    return {name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)} - set(
        model.all_tied_weights_keys)


def made_anew(model: PreTrainedModel, absent: Collection[str]) -> set[str]:
    """Return those parameters, of some that a checkpoint lacks, that the class makes by itself and always alike."""
    return {name for name in unsaved(model) & set(absent) if _makes_alike(model, name)}


def _makes_alike(model: PreTrainedModel, name: str) -> bool:
    """Return whether a class makes a parameter of a (meta) model the same way every time: it is not drawn at random."""
    path, _, key = name.rpartition(".")
    made = []
    for seed in range(2):
        module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            module.get_parameter(key).fill_(seed)
            model._init_weights(module)
        made.append(module.get_parameter(key))
    return torch.equal(*made)


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

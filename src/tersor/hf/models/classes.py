"""Which class a checkpoint is of, and what it does with text: told by config.json and transformers, never by a list."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tersor.errors import ModelError


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that config.json's `architectures` names; the causal language model where it names none.

    Raises
    ------
    ModelError
        If transformers has no such class, or it is not made from this configuration.
    """
    given = config.architectures or [None]
    if not isinstance(given, (list, tuple)):
        raise ModelError(f"config.json: architectures must be a list of class names, found {given!r}")
    named = given[0]
    if named is None:
        named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if named is None:
        raise ModelError(f"config.json names no class in 'architectures', and '{config.model_type}' is no causal "
                         "language model; name the class")
    found = getattr(transformers, str(named), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ModelError(f"config.json names the class '{named}', which transformers {transformers.__version__} lacks; "
                         "custom code is not run, so a newer transformers may help")
    if found.config_class is None or not isinstance(config, found.config_class):
        raise ModelError(f"config.json names the class '{named}', which is not made from a '{config.model_type}'; set "
                         "model_type and architectures to what the model was saved with")
    return found


def predicts_next_token(kind: type[PreTrainedModel]) -> bool:
    """Return whether a class is a language model: its logits at a token are of the next one."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    return kind.__name__ in names and takes_text(kind)


def takes_text(kind: type[PreTrainedModel]) -> bool:
    """Return whether a class reads token ids."""
    return kind.main_input_name == "input_ids" and "input_ids" in inspect.signature(kind.forward).parameters


def check_text(kind: type[PreTrainedModel]) -> None:
    """Raise `ModelError` unless a class reads token ids, so that text can calibrate or evaluate it."""
    if not takes_text(kind):
        raise ModelError(f"a {kind.__name__} reads '{kind.main_input_name}', not text, so text can neither calibrate "
                         "nor evaluate it; give --uncalibrated and --evaluation-tokens 0")


def check_language_model(config: PretrainedConfig, verb: str) -> None:
    """Raise `ModelError` unless config.json names a language model, which `verb` is for."""
    kind = model_class(config)
    if not predicts_next_token(kind):
        raise ModelError(f"{verb} is for language models, which predict the next token; config.json names a "
                         f"{kind.__name__}")


def feed(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Return the arguments with which a model reads token ids (batch, length).

    The decoder of an encoder-decoder reads the same ids as its encoder.
    """
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return inputs


def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Run a model; return its main output, and whether that is logits (of tokens or labels) and not hidden states.

    One logit alone, as rerankers give, is a score, and no logit of a distribution.
    """
    outputs = model(**inputs)
    logits = outputs.get("logits")
    return (outputs[0], False) if logits is None else (logits, logits.shape[-1] > 1)

"""Example inputs for a model of any class: found by what its `forward` takes and its configuration says, and tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor.errors import ModelError
from tersor.hf.models.matrices import FOREIGN

TOKENS = 12
WAVE = 8000  # samples of sound
FRAMES = 64  # frames of sound where the configuration does not say how many


def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run a model once and return its floating-point outputs by name; torch's generator is as it was afterwards."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some classes draw numbers in their forward pass
        outputs = model(**inputs)
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(
        outputs if isinstance(outputs, (tuple, list)) else [outputs])
    found = {str(name): value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}
    if any(value.is_meta for value in found.values()):
        raise RuntimeError("the model computed with weights that were not there")
    return found


def example_inputs(model: PreTrainedModel, seed: int = 0,
                   device: torch.device | None = None) -> dict[str, Any]:
    """Return small random inputs that a model runs on: text where it reads text, else pictures, sound or both.

    Parameters
    ----------
    device : torch.device or None
        Where the model runs; None: on the processor.

    Raises
    ------
    ModelError
        If it runs on none that can be made from its configuration; carries what it said to the first.
    """
    first: str | None = None
    for made in candidates(model, seed):
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}
        try:
            if run(model, inputs):
                return inputs
        except FOREIGN as error:
            first = first or f"{sorted(inputs)}: {type(error).__name__}: {str(error).strip()[:200]}"
    raise ModelError(f"{type(model).__name__} runs on none of the inputs that its configuration suggests; "
                     f"{first or 'it takes no input that is known'}")


def reach(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Run a model once; return its outputs, and the models inside that were not called, outermost only.

    Text does not reach a vision tower, for example.
    """
    outputs, called = _traced(model, inputs)
    return outputs, _outermost(model, lambda part: id(part) not in called)


def untouched(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[str]:
    """Return the models inside of which a run calls nothing, and what stands beside them of which the same is true.

    Some classes do not call a model inside, but its parts. A projector stands beside a vision tower.
    """
    _, called = _traced(model, inputs)

    def idle(part: nn.Module) -> bool:
        return not called & {id(module) for module in part.modules()}

    found = _outermost(model, idle)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in found):
        beside = [f"{path}.{name}".lstrip(".") for name, part in model.get_submodule(path).named_children()
                  if idle(part) and part.state_dict()]
        found += [name for name in beside if name not in found]
    return found


def _traced(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], set[int]]:
    """Run a model once; return its outputs, and the ids of the modules that were called."""
    called: set[int] = set()
    hooks = [part.register_forward_pre_hook(lambda part, _: called.add(id(part))) for part in model.modules()]
    try:
        return run(model, inputs), called
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(model: PreTrainedModel, chosen: Callable[[PreTrainedModel], bool]) -> list[str]:
    found: list[str] = []
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and isinstance(part, PreTrainedModel) and not inside and chosen(part):
            found.append(name)
    return found


def candidates(model: PreTrainedModel, seed: int) -> Iterator[dict[str, Any]]:
    """Yield inputs to try, the plainest first."""
    taken = inspect.signature(model.forward).parameters
    drawn = torch.Generator().manual_seed(seed)
    text, others = _text(model, taken, drawn), _senses(model, taken, drawn)
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    main = {name: tensors for name, tensors in others.items() if name == model.main_input_name}
    decoder = {name: tensor for name, tensor in text.items() if name.startswith("decoder")}
    if text and model.main_input_name not in others:
        yield {**text, **fixed}
    for tensor in main.get(model.main_input_name, []):
        yield {model.main_input_name: tensor, **decoder, **fixed}
    for name, tensors in others.items():
        for tensor in tensors:
            yield {**text, name: tensor, **fixed}
    if text:
        yield {**text, **fixed}
        yield {**text, **{name: tensors[0] for name, tensors in others.items()}, **fixed}
        yield {**{name: tensor.unsqueeze(1) for name, tensor in text.items()}, **fixed}  # a choice among one
    own = model.dummy_inputs
    yield {**{name: value for name, value in own.items() if name in taken}, **decoder, **fixed}


def _text(model: PreTrainedModel, taken: Mapping[str, Any], drawn: torch.Generator) -> dict[str, Tensor]:
    """Return token ids: none that means a picture or a sound, and the end of the text last."""
    facts = list(_facts(model.config.to_dict()))
    sizes = [value for key, value in facts if key.endswith("vocab_size") and type(value) is int and value > 1]
    least = min(sizes, default=2)
    special = {number for key, value in facts if "token" in key for number in (value if isinstance(value, list) else
                                                                               [value]) if type(number) is int}
    usual = [number for number in range(min(least, 4096)) if number not in special] or [0]
    ids = torch.tensor(usual)[torch.randint(len(usual), (1, TOKENS), generator=drawn)]
    ends = [value for key, value in facts if key == "eos_token_id" and type(value) is int and 0 <= value < least]
    if ends:
        ids[:, -1] = ends[0]
    found = {name: ids for name in ("input_ids", "decoder_input_ids") if name in taken}
    if not model.config.is_encoder_decoder:
        found.pop("decoder_input_ids", None)
    return found


def _senses(model: PreTrainedModel, taken: Mapping[str, Any], drawn: torch.Generator) -> dict[str, list[Tensor]]:
    """Return pictures and sounds by the name of the argument, in the shapes that may be meant."""
    facts: dict[str, Any] = {}
    for key, value in _facts(model.config.to_dict()):
        facts.setdefault(key, value)

    def number(default: int, *keys: str) -> int:
        return next((facts[key] for key in keys if type(facts.get(key)) is int and facts[key] > 0), default)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn).to(model.dtype)

    size = facts.get("image_size", 32)
    high, wide = (size, size) if type(size) is int else tuple(size)[:2] if isinstance(size, (list, tuple)) else (32, 32)
    channels, bands = number(3, "num_channels", "in_channels"), number(80, "num_mel_bins", "input_feat_per_channel")
    frames = 2 * number(FRAMES // 2, "max_source_positions")
    still = [noise(1, channels, high, wide), noise(1, number(1, "num_frames"), channels, high, wide)]
    made = {"pixel_values": still, "pixel_values_videos": still[1:],
            "input_features": [noise(1, bands, frames), noise(1, FRAMES, bands)],
            "input_values": [noise(1, WAVE), noise(1, number(FRAMES, "max_length"), bands)]}
    return {name: tensors for name, tensors in made.items() if name in taken}


def _facts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every field of a configuration and of those inside it, outer ones first."""
    yield from ((str(key), value) for key, value in config.items())
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _facts(value)

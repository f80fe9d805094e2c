"""`generate` on CUDA by loops of Tersor's, where that is exact: over a static cache, or a compressed one that grows."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.cache_utils import StaticLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tersor.hf.models.choosing import Plan, planned
from tersor.hf.models.decoding import LESSON, Decoding
from tersor.hf.models.generating import CompiledCall, compiled, showing, state_of
from tersor.hf.models.growing import GrowingCache, GrowingLoop, unfit
from tersor.hf.models.replaying import random_state, set_random_state
from tersor.hf.models.stepping import DeclinedError, decline, left
from tersor.ops.dispatch import kernels_allowed

STATIC = "static"
DEVICES = frozenset({"cuda"})  # where a step costs less than what the host does for it
TOLD = {"input_ids", "logits_processor", "stopping_criteria", "generation_config"}  # to transformers' loop
KNOWN = {"inputs", "generation_config", "logits_processor", "stopping_criteria", "kwargs"}  # of what `generate` takes
OPTIONS = ("compile_config", "disable_compile", "cache_implementation", "use_cache")


class Generate:
    """Stands for a model's `generate`; `type(model).generate(model, …)` is transformers' as it was.

    What is exact by a loop of Tersor's: greedy and sampled text of any batch, with the processors of `choosing`,
    ended by a length or tokens. All else is left to transformers' loop, which is told at level INFO, once a reason.

    Parameters
    ----------
    model : PreTrainedModel
    compiles : bool
        Whether steps over a static cache are Tersor's; those over a compressed cache are.
    """

    def __init__(self, model: Any, *, compiles: bool = True) -> None:
        self._model, self._compiles = model, compiles
        self._start()

    def _start(self) -> None:
        update_wrapper(self, MethodType(type(self._model).generate, self._model), updated=())  # for `help`
        self._signature = inspect.signature(self)
        self._lock = threading.Lock()
        self._loop, self._growing = Loop(), GrowingLoop()

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_compiles": self._compiles}  # copies compile for themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Generate, as `GenerationMixin.generate` says."""
        model = self._model
        generate = type(model).generate
        loop = self._asked(args, named)
        if loop is None:
            return generate(model, *args, **named)
        if not self._lock.acquire(blocking=False):
            left("another thread generates by it")
            return generate(model, *args, **named)
        noted = dict(vars(model))
        try:
            with _on(model.device):
                return generate(model, *args, custom_generate=loop, **named)
        except DeclinedError as reason:
            left(str(reason))
            for name in vars(model).keys() - noted.keys():  # as if not called: some versions note a cache, still empty
                del vars(model)[name]
            vars(model).update(noted)
        finally:
            self._lock.release()
        return generate(model, *args, **named)

    def _asked(self, args: tuple[Any, ...], named: dict[str, Any]) -> Loop | GrowingLoop | None:
        """Return the loop for the cache that is asked for, None where it would not be told of all that is asked."""
        model = self._model
        given = self._signature.bind(*args, **named).arguments
        options = given.get("kwargs", {})
        configs = [one for one in (given.get("generation_config"), model.generation_config) if one is not None]
        caches = [options.get("cache_implementation"), *(one.cache_implementation for one in configs)]
        kind = next((one for one in caches if one is not None), None)
        grows = kind is None and isinstance(options.get("past_key_values"), GrowingCache)
        if not (grows or (kind == STATIC and self._compiles)) or model.device.type not in DEVICES:
            return None
        other = {name for name, value in given.items()
                 if name not in KNOWN and value is not None and value is not False}
        other |= {"tokenizer", "assistant_tokenizer"} & set(options)
        if other:
            left(f"'{min(other)}' is for transformers' loop")
            return None
        return self._growing if grows else self._loop


class Loop:
    """What `generate` calls with all prepared: transformers' loop for some tokens, then steps of our own."""

    def __init__(self) -> None:
        self._seen: list[Any] | None = None
        self._forward: Callable[..., Any] | None = None
        self._decoding: Decoding | None = None
        self._of: Any = None
        self._refused = ""

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList,
                 stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig,
                 **model_kwargs: Any) -> Tensor:
        """Return sequences (batch, tokens).

        Raises
        ------
        DeclinedError
            If transformers' loop has to do it; what was drawn at random is as if it had not been.
        """
        plan = planned(generation_config, logits_processor, stopping_criteria)
        _check(model, input_ids, generation_config, model_kwargs)
        decoding = self._chosen(model, input_ids, model_kwargs["past_key_values"])
        known, prompt = decoding.known, input_ids.shape[1]
        few = min(plan.length, prompt + (2 if known else 1 + LESSON))
        first = [one for one in stopping_criteria if isinstance(one, EosTokenCriteria)]
        model_kwargs["past_key_values"] = decoding.cache
        shown, random = Shown(decoding, prompt, plan), random_state(model.device)
        try:
            with showing(model, shown):
                ids = type(model)._sample(
                    model, input_ids, logits_processor=logits_processor, generation_config=generation_config,
                    stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(few), *first]), **model_kwargs)
            shown.check(ids.shape[1])
            return ids if ids.shape[1] < few or few == plan.length else decoding.run(ids, prompt, plan)
        except DeclinedError as reason:
            self._decoding = None
            self._refused = "" if known else str(reason)
            if plan.sample:
                set_random_state(random, model.device)
            raise

    def _chosen(self, model: Any, ids: Tensor, fresh: StaticCache) -> Decoding:
        """Return the steps kept from the call before if all is as it was, else new ones: over the fresh cache."""
        seen, addresses = state_of(model)
        if self._forward is None or seen != self._seen:
            self._seen, self._forward, self._decoding, self._refused = seen, compiled(model), None, ""
        if self._refused:
            raise DeclinedError(self._refused)
        kind = ids.device.type
        of = [addresses, len(ids), [(type(layer), getattr(layer, "max_cache_len", 0)) for layer in fresh.layers],
              torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
              torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()]
        if self._decoding is None or of != self._of:
            self._decoding = None  # what it holds is free before more is asked for
            self._of, self._decoding = of, Decoding(self._forward, fresh, ids.device)
        else:
            self._decoding.cache.reset()
        return self._decoding


class Shown:
    """Stands for the compiled model in transformers' loop.

    Parameters
    ----------
    decoding : Decoding
    prompt : int
        Tokens that were given: the first step reads the one after them.
    plan : Plan
    """

    def __init__(self, decoding: Decoding, prompt: int, plan: Plan) -> None:
        self._decoding, self._prompt, self._plan, self._steps = decoding, prompt, plan, 0

    def __call__(self, **given: Any) -> Any:
        """Do a step; return what the model would."""
        self._steps += 1
        return self._decoding.shown(given, self._prompt + self._steps - 1, self._steps, self._plan)

    def check(self, tokens: int) -> None:
        """Raise DeclinedError unless all steps up to so many tokens were shown."""
        if self._steps != tokens - self._prompt - 1:
            raise DeclinedError("transformers compiles no steps of it")


def install(model: PreTrainedModel, *, compiles: bool = True) -> None:
    """Let a loaded model compile its steps by Tersor's backend, and generate by Tersor's loop if it compiles."""
    changed: Any = model
    changed.get_compiled_call = CompiledCall(model)
    if compiles and _generates(type(model)):
        changed.generate = Generate(model)


def grow(model: PreTrainedModel) -> None:
    """Let a model generate by Tersor's loop over a compressed cache; one that `install` has seen already does."""
    changed: Any = model
    if not isinstance(vars(model).get("generate"), Generate) and _generates(type(model)):
        changed.generate = Generate(model, compiles=False)


def _generates(kind: type[Any]) -> bool:
    """Tell whether a class generates as `GenerationMixin` does, and that as the loop takes it to."""
    theirs: list[Any] = [getattr(GenerationMixin, name, None) for name in ("generate", "_sample")]
    if None in theirs or [getattr(kind, name, None) for name in ("generate", "_sample")] != theirs:
        return False
    whole, loop = (inspect.signature(one).parameters for one in theirs)
    needed = {name for name, one in loop.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    return "custom_generate" in whole and needed - {"self"} <= TOLD


def _check(model: Any, ids: Tensor, config: GenerationConfig, given: dict[str, Any]) -> None:
    """Raise DeclinedError where steps are not what the loop takes them for."""
    held = given.get("past_key_values")
    layers = [layer for layer in held.layers if isinstance(layer, StaticLayer)] if isinstance(held, StaticCache) else []
    asked = {name: getattr(config, name, None) for name in OPTIONS}
    decline({
        **unfit(model, ids, config),
        "it is compiled as the user says, or not": asked["compile_config"] is not None or asked["disable_compile"],
        "there is no static cache": asked["cache_implementation"] != STATIC or not layers or not asked["use_cache"],
        "its cache is not empty": any(layer.is_initialized and int(layer.get_seq_length()) for layer in layers[:1]),
        "its cache is of windows, or of states":
            any(layer.is_sliding for layer in layers) or len(layers) != len(getattr(held, "layers", ())),
        "its prompt is not of tokens": given.get("inputs_embeds") is not None,
        "ops run as plain torch": not kernels_allowed(),
        "'get_compiled_call' is not Tersor's": not isinstance(model.get_compiled_call, CompiledCall),
    })


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

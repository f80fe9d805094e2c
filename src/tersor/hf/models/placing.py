"""A compressed model on several devices: payloads are placed and offloaded as weights are; ties stay together.

accelerate moves parameters where a device map says, and keeps them on the CPU or on disk until their module runs. It
leaves buffers where the module computes, so payloads, which are buffers, are parameters while a device map is in force.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tersor.errors import CodecConfigError
from tersor.nn import Buffers, WeightView

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers makes by itself


def spreads(device_map: Any) -> bool:
    """Return whether a device map may name more than one device, or the disk."""
    if isinstance(device_map, Mapping):
        return len({str(device) for device in device_map.values()}) > 1 or "disk" in device_map.values()
    return device_map in SPREAD


def as_parameters(model: nn.Module) -> None:
    """Turn payloads from buffers into parameters.

    Raises
    ------
    CodecConfigError
        If matrices share tables, which lie in one place.
    """
    for module, name in _places(model):
        buffer = module._buffers.pop(name, None)
        if buffer is not None:
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def check_tables(model: nn.Module, device_map: Any) -> None:
    """Raise `CodecConfigError` if a device map spreads a model whose matrices share tables."""
    shared = next((name for payload in _payloads(model) for _, name in payload.shared.values()), None)
    if shared is not None and isinstance(device_map, Mapping) and spreads(device_map):
        raise CodecConfigError(f"matrices of this model share tables, such as '{shared}', which lie on one device, but "
                               f"the device map names {sorted({str(device) for device in device_map.values()})}; load "
                               "it on one, for example with device_map='cuda'")


def settle(model: nn.Module) -> None:
    """Make a loaded model ready: payloads back to buffers on one device; else modules run where their payloads are."""
    spread = spreads(getattr(model, "hf_device_map", None))
    for module, name in _places(model):
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        parameter.requires_grad_(False)
        if not spread:
            del module._parameters[name]
            module.register_buffer(name, parameter.detach())
    if spread:
        check_tables(model, vars(model)["hf_device_map"])
        for module in list(model.modules()):
            owners = {payload.owner for payload in _held(module) if payload.owner is not module}
            if owners:
                _join(module, owners)


def _join(module: nn.Module, owners: set[nn.Module]) -> None:
    """Let a module run where the payloads are that it borrows, and have them fetched if they are offloaded."""
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
    from accelerate.utils import send_to_device

    class Borrowing(ModelHook):
        """Fetches what other modules own before a module runs, and lets go of it afterwards."""

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """Fetch the payloads, and move what the module reads to them."""
            del module
            device = None
            for owner, hook in _hooks(owners, AlignDevicesHook):
                hook.pre_forward(owner)
                device = hook.execution_device
            return (args, kwargs) if device is None else (send_to_device(args, device), send_to_device(kwargs, device))

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            """Let go of the payloads."""
            del module
            for owner, hook in _hooks(owners, AlignDevicesHook):
                hook.post_forward(owner, None)
            return output

    add_hook_to_module(module, Borrowing(), append=True)


def _hooks(owners: set[nn.Module], kind: type[Any]) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the hooks of a kind that modules have, singly or in a row of hooks."""
    for owner in owners:
        hook = vars(owner).get("_hf_hook")
        for one in (hook, *vars(hook).get("hooks", ())) if hook is not None else ():
            if isinstance(one, kind):
                yield owner, one


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return where payload tensors are, but for shared tables: module and name."""
    found = [place for payload in _payloads(model) for key, place in payload.places.items()
             if key not in payload.shared]
    return list(dict.fromkeys(found))


def _payloads(model: nn.Module) -> list[Buffers]:
    return list(dict.fromkeys(payload for module in model.modules() for payload in _held(module)))


def _held(module: nn.Module) -> list[Buffers]:
    """Return the payloads that a module computes with, its own or another's."""
    return [payload for value in vars(module).values() if isinstance(value, WeightView) for payload in value.payloads]

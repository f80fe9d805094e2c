"""Found by torch (entry point `torch.backends`): transformers then knows Tersor's models, whoever imports what.

`arm` runs at the end of every `import torch`, so it only leaves word: nothing of Tersor is imported until transformers
meets a configuration that says "tersor". It is a package of its own, because importing Tersor needs torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

METHOD = "tersor"
MODULE = "transformers.quantizers.auto"
TABLES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")

_this_thread = threading.local()


def arm() -> None:
    """Let transformers' tables of quantizers find Tersor when they are asked for it; never raises."""
    if not any(isinstance(finder, Waiting) for finder in sys.meta_path) and not _extend():
        sys.meta_path.insert(0, Waiting())


class Waiting:
    """A finder of modules that waits for one to be loaded, extends its tables, and leaves."""

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of the module waited for, with a loader that extends it; None for any other."""
        del target
        if name != MODULE:
            if MODULE in sys.modules and _extend():  # it was being loaded when torch was imported
                self.leave()
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = Extending(spec.loader, self)  # pyright: ignore[reportAttributeAccessIssue]
        return spec

    def leave(self) -> None:
        """Take no further part in imports."""
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]


class Extending:
    """A loader that is another one, and extends what that has loaded."""

    def __init__(self, loader: Any, finder: Waiting) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return what the other makes."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then extend its tables."""
        self._loader.exec_module(module)
        if _extend():
            self._finder.leave()


class Asking(dict[str, Any]):
    """A table that imports Tersor, which adds itself, when it is first asked for it."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._ready(key))

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._ready(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the entry of a key, or `default`."""
        return super().get(self._ready(key), default)

    def _ready(self, key: Any) -> Any:
        asking = getattr(_this_thread, "asking", False)  # what is imported asks the table, too
        if key == METHOD and not asking and not super().__contains__(key):
            _this_thread.asking = True
            try:
                importlib.import_module("tersor.hf")
            finally:
                _this_thread.asking = False
        return key


def _extend() -> bool:
    """Make the tables ask; return whether they are there."""
    module = sys.modules.get(MODULE)
    tables = {name: table for name in TABLES if isinstance(table := getattr(module, name, None), dict)}
    for name, table in tables.items():
        if not isinstance(table, Asking):
            setattr(module, name, Asking(table))
    return len(tables) == len(TABLES)

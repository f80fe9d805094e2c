"""From ids, JSON configurations and factory strings to codecs; third-party codecs come through entry points.

A factory string is a head followed by what it wraps: `"rot,lm3"` is a rotation of a 3-bit Lloyd-Max scalar,
`"sum(lm2;rtn2g64)"` a sum. Every field that decoding needs is in the string.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tersor.codecs import BUILT_IN
from tersor.contract.codec import Codec
from tersor.errors import CodecConfigError, UnknownCodecError

ENTRY_POINTS = "tersor.codecs"
EXAMPLES = (*(cls.examples[0] for cls in BUILT_IN), *(text for cls in BUILT_IN for text in cls.examples[1:]))


@lru_cache(maxsize=1)
def codec_classes() -> Mapping[str, type[Codec]]:
    """Return every codec class by id: the built-in ones and those of the entry-point group `tersor.codecs`.

    Raises
    ------
    CodecConfigError
        If two classes claim one id.
    """
    classes: dict[str, type[Codec]] = {}
    loaded = [entry.load() for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    for cls in (*BUILT_IN, *loaded):
        if classes.setdefault(cls.id, cls) is not cls:
            raise CodecConfigError(f"two codec classes claim the id '{cls.id}': {classes[cls.id]} and {cls}; "
                                   "uninstall one of the packages")
    return classes


def from_config(config: Mapping[str, Any]) -> Codec:
    """Return the codec of a JSON configuration; the inverse of `Codec.to_config`.

    Raises
    ------
    UnknownCodecError
        If the id, or the version of its format, is not known here.
    CodecConfigError
        If fields are missing, unknown or unsound.
    """
    classes = codec_classes()
    if not isinstance(config, Mapping):
        raise CodecConfigError(f"a codec configuration is an object with an id, found {config!r}")
    name = config.get("id")
    if not isinstance(name, str) or name not in classes:
        raise UnknownCodecError(str(name), tuple(sorted(classes)))
    cls = classes[name]
    version = config.get("version", cls.version)
    if not isinstance(version, int) or not 1 <= version <= cls.version:
        raise UnknownCodecError(f"{name} version {version}", (f"{name} version 1 to {cls.version}",))
    later = {field: before for field, (since, before) in cls.later.items() if version < since}
    known = {f.name for f in dataclasses.fields(cls)} - set(later)  # type: ignore[arg-type]
    given = {key: value for key, value in config.items() if key not in ("id", "version")}
    if set(given) != known:
        raise CodecConfigError(f"codec '{name}' has fields {sorted(known)}, found {sorted(given)}")
    codec = cls(**{key: _value(value) for key, value in given.items()}, **later)
    filled = [field for field in cls.later if field in given and getattr(codec, field) != given[field]]
    if filled:  # by what a later version may choose otherwise
        raise CodecConfigError(f"codec '{name}' must say its {filled[0]}, found {given[filled[0]]!r}")
    return codec


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_config(value)
    if isinstance(value, list):
        return tuple(_value(v) for v in value)
    return value


def parse(text: str) -> Codec:
    """Return the codec of a factory string; the inverse of `Codec.spec`.

    Raises
    ------
    UnknownCodecError
        If no codec understands the string's head.
    CodecConfigError
        If the string is malformed or its fields are unsound.
    """
    try:
        codec, rest = _parse(text.strip())
    except RecursionError:
        raise CodecConfigError(f"codec string '{text[:40]}…' is nested too deeply") from None
    if rest:
        raise CodecConfigError(f"codec string '{text}': '{rest}' is left over after '{codec.spec()}'")
    return codec


def _parse(text: str) -> tuple[Codec, str]:
    best: tuple[int, type[Codec], re.Match[str]] | None = None
    for cls in codec_classes().values():
        match = re.compile(cls.grammar).match(text)
        if match and (best is None or match.end() > best[0]):
            best = match.end(), cls, match
    if best is None:
        raise UnknownCodecError(text, EXAMPLES, "codec string")
    end, cls, match = best
    head, rest = text[:end], text[end:]
    if head.endswith(","):
        inner, rest = _parse(rest)
        return cls.from_spec(match, (inner,)), rest
    if not head.endswith("("):
        return cls.from_spec(match, ()), rest
    parts: list[Codec] = []
    while True:
        part, rest = _parse(rest)
        parts.append(part)
        if rest.startswith(";"):
            rest = rest[1:]
        elif rest.startswith(")"):
            return cls.from_spec(match, parts), rest[1:]
        else:
            raise CodecConfigError(f"codec string '{text}': expected ';' or ')' before '{rest}'")

"""How factory strings write levels, group size and axis; and which of these are sound."""

from __future__ import annotations

from tersor.errors import CodecConfigError


def check_fields(levels: int, group_size: int | None, axis: str, name: str, most: int) -> None:
    """Raise `CodecConfigError` unless the fields of a grouped scalar codec are sound."""
    if not isinstance(levels, int) or not 2 <= levels <= most:
        raise CodecConfigError(f"{name}: levels must be an integer in [2, {most}], found {levels!r}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise CodecConfigError(f"{name}: group_size must be a positive integer or None, found {group_size!r}")
    if axis not in ("in", "out"):
        raise CodecConfigError(f"{name}: axis must be 'in' or 'out', found {axis!r}")


def levels_token(levels: int) -> str:
    """Return how a factory string writes `levels`: bits when a power of two, else `L` and the number."""
    return str(levels.bit_length() - 1) if levels & (levels - 1) == 0 else f"L{levels}"


def parse_levels(token: str) -> int:
    """Inverse of `levels_token`."""
    return int(token[1:]) if token.startswith("L") else 2 ** min(int(token), 99)  # 99: refused later, cheaply


def group_token(group_size: int | None, axis: str) -> str:
    """Return how a factory string writes group size and axis."""
    return (f"g{group_size}" if group_size else "") + ("o" if axis == "out" else "")

"""Heat maps and bars as light SVG to be put into a page: no script, numbers as text, a title on every cell.

The ramp runs from dark blue over grey to yellow: its lightness alone tells the order, to the colour-blind too. Text in
cells is black or white, whichever stands out; all else takes the page's own colours, `--ink` and `--line`.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence

RAMP = ((10, 38, 84), (72, 86, 120), (125, 124, 120), (186, 170, 96), (250, 229, 80))
ROW, CHARACTER = 20, 6.6  # pixels: height of a row, width of a character of the labels
LEGEND_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Scale:
    """From a number to a colour.

    Attributes
    ----------
    low, high : float
        The ends of the ramp.
    logarithmic : bool
    digits : str
        How numbers are printed, as in a format string.
    unit : str
    """

    low: float
    high: float
    logarithmic: bool = False
    digits: str = ".2f"
    unit: str = ""

    @classmethod
    def over(cls, values: Iterable[float], *, logarithmic: bool = False, digits: str = ".2f", unit: str = "") -> Scale:
        """Return the scale that just holds some values; of those that are no numbers, none count."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)] or [1.0]
        return cls(min(found), max(found), logarithmic, digits, unit)

    def place(self, value: float) -> float:
        """Return where a value lies on the ramp, 0 to 1; one half where all values are equal."""
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            value = max(value, self.low)
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def at(self, place: float) -> float:
        """Return the value at a place of the ramp."""
        if self.logarithmic:
            return self.low * (self.high / self.low) ** place
        return self.low + (self.high - self.low) * place

    def text(self, value: float) -> str:
        """Return a number as the chart prints it."""
        return f"{value:{self.digits}}"


def colour(place: float) -> tuple[str, str]:
    """Return the colour at a place of the ramp, and the colour of text on it, as hexadecimal."""
    position = place * (len(RAMP) - 1)
    index = min(int(position), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (position - index)) for a, b in zip(RAMP[index], RAMP[index + 1],
                                                                               strict=True))
    light = 0.2126 * _linear(red) + 0.7152 * _linear(green) + 0.0722 * _linear(blue)
    return f"#{red:02x}{green:02x}{blue:02x}", "#000" if light > 0.18 else "#fff"  # 0.18: equal contrast to both


def _linear(value: int) -> float:
    """Return the linear light of an sRGB channel."""
    share = value / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str],
             cells: Mapping[tuple[str, str], tuple[float, str]], scale: Scale) -> str:
    """Return a table of colours.

    Parameters
    ----------
    columns : sequence of str
        The last part after a dot is a heading's second line.
    cells : mapping of (row, column) to (value, title)
        A pair that is not there stays empty.
    """
    left = round(12 + CHARACTER * max(map(len, rows), default=0))
    heads = [_two_lines(column) for column in columns]
    widths = [round(max(52, 10 + CHARACTER * max(map(len, lines)))) for lines in heads]
    starts = [left + sum(widths[:number]) for number in range(len(columns))]
    top, wide = 36 if any(columns) else 4, left + sum(widths)
    parts = [_label(start + width / 2, y, line, "middle")
             for start, width, lines in zip(starts, widths, heads, strict=True)
             for y, line in zip((13, 28), lines, strict=True) if line]
    for number, row in enumerate(rows):
        y = top + ROW * number
        parts.append(_label(left - 6, y + 14, row, "end"))
        for start, width, column in zip(starts, widths, columns, strict=True):
            if (row, column) in cells:
                value, told = cells[row, column]
                fill, ink = colour(scale.place(value))
                parts.append(f'<g><title>{html.escape(told)}</title><rect x="{start}" y="{y}" '
                             f'width="{width - 1}" height="{ROW - 1}" fill="{fill}"/><text x="{start + width / 2:.0f}" '
                             f'y="{y + 14}" fill="{ink}" text-anchor="middle">{scale.text(value)}</text></g>')
    return _svg(title, wide, top + ROW * len(rows), parts)


def _two_lines(heading: str) -> tuple[str, str]:
    """Divide a heading before its last part that is more than a star."""
    stem = heading.rstrip(".*")
    first, _, last = stem.rpartition(".")
    return first, last + heading[len(stem) :]


def legend(scale: Scale) -> str:
    """Return what the colours of a scale stand for."""
    if scale.high <= scale.low:
        return ""
    parts, width = [], 64
    for step in range(LEGEND_STEPS):
        place = step / (LEGEND_STEPS - 1)
        fill, ink = colour(place)
        parts.append(f'<rect x="{step * width}" y="0" width="{width}" height="{ROW}" fill="{fill}"/><text '
                     f'x="{step * width + width // 2}" y="14" fill="{ink}" text-anchor="middle">'
                     f'{scale.text(scale.at(place))}</text>')
    parts.append(_label(LEGEND_STEPS * width + 8, 14, scale.unit, "start"))
    return _svg(f"Colours: {scale.unit}", LEGEND_STEPS * width + 16 + CHARACTER * len(scale.unit), ROW, parts)


def bars(title: str, lengths: Mapping[str, float], told: Mapping[str, str]) -> str:
    """Return horizontal bars, one a name, with what is `told` of each behind it."""
    left, most, longest = 12 + CHARACTER * max(map(len, lengths), default=0), max(lengths.values(), default=1) or 1, 320
    parts = []
    for number, (name, length) in enumerate(lengths.items()):
        y, width = ROW * number, longest * length / most
        parts.append(f'<g><title>{html.escape(f"{name}: {told[name]}")}</title>{_label(left - 6, y + 14, name, "end")}'
                     f'<rect class="bar" x="{left:.0f}" y="{y + 2}" width="{max(width, 1):.1f}" height="{ROW - 4}"/>'
                     f'{_label(left + width + 6, y + 14, told[name], "start")}</g>')
    room = CHARACTER * max(map(len, told.values()), default=0)
    return _svg(title, left + longest + 12 + room, ROW * len(lengths), parts)


def scatter(title: str, points: Mapping[str, tuple[float, float]]) -> str:
    """Return points by name, (x, y): x from 0 to 1, and y, positive, on a logarithmic axis."""
    width, height, margin = 520.0, 300.0, 50.0
    scale = Scale.over((y for _, y in points.values()), logarithmic=True, digits=".0f")
    parts = [f'<text x="{margin:.0f}" y="18">{html.escape(title)}</text>']
    for step in range(6):
        x = margin + width * step / 5
        parts.append(_label(x, height + margin + 18, f"{step / 5:.1f}", "middle"))
    for place in (0.0, 0.5, 1.0):
        parts.append(_label(margin - 6, margin + height * (1 - place) + 4, f"{scale.at(place):.0f}", "end"))
    for name, (x, y) in points.items():
        left, top = margin + width * x, margin + height * (1 - scale.place(y))
        told = html.escape(f"{name}: {x:.3f}, {y:.0f}")
        parts.append(f'<g><title>{told}</title><circle cx="{left:.0f}" cy="{top:.0f}" r="4"/>'
                     f'{_label(left - 8, top - 6, name, "end" if x > 0.5 else "start")}</g>')
    return _svg(title, width + 2 * margin, height + 2 * margin, parts)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="ink" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(title: str, width: float, height: float, parts: Iterable[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(title)}" '
            f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
            f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>")

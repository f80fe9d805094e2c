"""Draw what a linear trellis code is, for docs/codecs/trellis.md: stream, window, filter; and a product with it.

    python tools/draw_trellis.py > docs/codecs/trellis.svg

Numbers in the drawing are computed: those of the stream and the taps that stand there.
"""

from __future__ import annotations

from collections.abc import Sequence

BITS = (1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1)
TAPS = (0.66, 0.55, -0.38, 0.29, 0.17, -0.12)  # the newest bit's first
SHIFT, STEP = 2, 5  # bits a number; the number that is shown: its window ends with bit 2 * 5 + 1
CELL, LEFT, TOP, WIDTH, HEIGHT = 32, 40, 78, 760, 452

STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #24292f; text-anchor: middle }
  .head { font-weight: 600; text-anchor: start } .left { text-anchor: start } .small { font-size: 12px; fill: #57606a }
  .paper { fill: #ffffff } .cell { fill: #f6f8fa; stroke: #8c959f } .window { fill: #b6d7ff }
  .line { stroke: #57606a; fill: none; stroke-width: 1.4 } .mark { stroke: #0969da; fill: none; stroke-width: 2 }
  .next { stroke: #bc4c00; fill: none; stroke-width: 2; stroke-dasharray: 5 3 } .box { fill: #eef6ff; stroke: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9da7b1 } .paper { fill: #1f2430 } .cell { fill: #2b3240; stroke: #6e7681 }
    .window { fill: #1f4f85 } .line { stroke: #9da7b1 } .mark { stroke: #58a6ff }
    .next { stroke: #ffa657 } .box { fill: #22344d; stroke: #58a6ff }
  }
"""


def number(step: int) -> float:
    """Return the number of a step: the last bits, as signs, times their taps; the stream is a circle."""
    newest = SHIFT * step + SHIFT - 1
    return sum(tap * (2 * BITS[(newest - age) % len(BITS)] - 1) for age, tap in enumerate(TAPS))


def text(x: float, y: float, said: str, kind: str = "") -> str:
    """Return a text."""
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{said}</text>'


def cell(place: int, row: float, said: str, kind: str = "") -> str:
    """Return a box of the stream's grid."""
    x = LEFT + CELL * place
    return (f'<rect x="{x}" y="{row:g}" width="{CELL}" height="{CELL}" class="cell {kind}"/>'
            + text(x + CELL / 2, row + 21, said))


def bracket(first: int, last: int, row: float, kind: str) -> str:
    """Return a bracket under the boxes from one place to another."""
    left, right = LEFT + CELL * first + 2, LEFT + CELL * (last + 1) - 2
    return f'<path d="M{left} {row} v8 H{right} v-8" class="{kind}"/>'


def arrow(points: Sequence[tuple[float, float]]) -> str:
    """Return a line through points that ends in an arrow head."""
    return f'<path d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}" class="line" marker-end="url(#tip)"/>'


def stream() -> list[str]:
    """Return the stream, two windows on it, and the number that one of them gives."""
    newest = SHIFT * STEP + SHIFT - 1
    oldest = newest - len(TAPS) + 1
    parts = [text(LEFT, 30, "A row is stored as a stream of bits: here 2 for each number", "head"),
             text(LEFT, 52, "The stream is a circle: the window of the first number reaches back to the last bits.",
                  "left small")]
    for place, bit in enumerate(BITS):
        parts.append(cell(place, TOP, str(bit), "window" if oldest <= place <= newest else ""))
    end = LEFT + CELL * len(BITS)
    parts.append(f'<path d="M{end + 4} {TOP + 16} h14 v-26 H{LEFT - 18} v26 h10" class="line" '
                 'marker-end="url(#tip)"/>')
    parts += [bracket(oldest, newest, TOP + 38, "mark"),
              text(LEFT + CELL * oldest - 50, TOP + 50, "a window", "small"),
              bracket(oldest + SHIFT, newest + SHIFT, TOP + 50, "next"),
              text(LEFT + CELL * (newest + SHIFT + 1) + 76, TOP + 62, "slides by 2 for the next", "small")]
    row = TOP + 84
    for age, tap in enumerate(TAPS):
        place = newest - age
        sign = "+1" if BITS[place] else "-1"
        parts.append(cell(place, row, sign, "window"))
        parts.append(text(LEFT + CELL * place + CELL / 2, row + 50, f"{tap:g}".replace("0.", ".")))
    middle = LEFT + CELL * (newest + 1)
    parts += [text(LEFT + CELL * oldest - 50, row + 21, "signs", "small"),
              text(LEFT + CELL * oldest - 50, row + 50, "taps, fixed", "small"),
              arrow([(middle + 8, row + 34), (middle + 50, row + 34)]),
              text(middle + 62, row + 39, f"w<tspan dy='3' font-size='10'>{STEP}</tspan><tspan dy='-3'> = sum of sign "
                                          f"times tap = {number(STEP):.2f}</tspan>", "left")]
    return parts


def box(x: float, y: float, width: float, said: Sequence[str]) -> str:
    """Return a box with lines of text."""
    lines = "".join(text(x + width / 2, y + 22 + 18 * i, line, "small" if i else "") for i, line in enumerate(said))
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="54" rx="6" class="box"/>{lines}'


def product() -> list[str]:
    """Return how a vector meets the stream."""
    row = 312
    return [text(LEFT, row - 38, "A product with the row decodes nothing", "head"),
            text(LEFT, row - 16, "Every number is a sum of signs, so the filter may act on the vector instead: once, "
                                 "for all rows.", "left small"),
            box(LEFT, row, 130, ("vector x", "N numbers")), arrow([(LEFT + 132, row + 27), (LEFT + 176, row + 27)]),
            box(LEFT + 180, row, 150, ("filter, turned round", "g = Cᵀ x: 2 N numbers")),
            arrow([(LEFT + 332, row + 27), (LEFT + 376, row + 27)]),
            box(LEFT + 380, row, 150, ("meets the signs", "+g or -g by each bit")),
            arrow([(LEFT + 532, row + 27), (LEFT + 576, row + 27)]),
            box(LEFT + 580, row, 100, ("y = x · w", "times scale")),
            arrow([(LEFT + 455, row + 108), (LEFT + 455, row + 58)]),
            text(LEFT + 455, row + 122, "the stored bits, as they are", "small")]


def main() -> None:
    """Print the drawing."""
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
          'aria-label="A window slides over a stream of bits; signs times taps give a number">')
    print(f'<style>{STYLE}</style>\n<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
          'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#57606a"/></marker></defs>')
    print(f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="paper"/>')
    print("\n".join((*stream(), *product())))
    print("</svg>")


if __name__ == "__main__":
    main()

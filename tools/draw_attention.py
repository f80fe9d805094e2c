"""Draw time against context of attention over caches on a GPU, for docs/kv.md, from bench/results/kv_attention.jsonl.

    python tools/draw_attention.py [RESULTS] > docs/kv-attention.svg

Both axes are logarithmic: a method whose line runs below that of the dense cache is faster, by as much as it is lower.
transformers' QuantizedCache is drawn where it was measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "bench/results/kv_attention.jsonl"
TOKENS, SEQUENCES = (8192, 32768, 131072), (1, 8)
METHODS = {"none": ("dense, bf16", "#57606a"), "rot,lm2": ("lm2, 2.1 bits", "#0969da"),
           "rot,tr2x8": ("tr2x8, 2.1 bits", "#1a7f37"), "klt@2": ("klt, 2 bits", "#bc4c00"),
           "rot,lm4": ("lm4, 4.1 bits", "#8250df"), "klt@4": ("klt, 4 bits", "#bf3989")}
OTHERS = {"quanto:4": ("quanto, 4 bits", "#9a6700"), "hqq:4": ("HQQ, 4 bits", "#cf222e")}  # where they were measured
LOW = 10.0  # microseconds
TICKS = (10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
WIDTH, HEIGHT, LEFT, TOP, PANEL, GAP, LABELS = 930, 400, 66, 56, 270, 184, 14

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f } .end { text-anchor: end } .middle { text-anchor: middle }
  .head { font-weight: 600 } .paper { fill: #ffffff } .grid { stroke: #d0d7de; stroke-width: 1 }
  polyline { fill: none; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .paper { fill: #1f2430 } .grid { stroke: #444c56 }
  }
"""


Times = dict[tuple[str, int, int], float]


def times(results: Path) -> Times:
    """Return microseconds by method, tokens and sequences; of a case that was measured again, the last."""
    found = {}
    for line in map(json.loads, results.read_text().splitlines()):
        case = line["case"]
        found[case["method"], case["tokens"], case["batch"]] = float(line["numbers"]["us"])
    return found


def ticks(found: Times) -> list[int]:
    """Return the numbers of the upright axis: up to 1,000, or the first above all times that are drawn."""
    most = max([1000.0, *(found[key] for key in found if key[0] in METHODS | OTHERS)])
    return [tick for tick, below in zip(TICKS, (0, *TICKS), strict=False) if below < most]


def place(panel: int, tokens: int, microseconds: float, high: float) -> tuple[float, float]:
    """Return where a time stands in the drawing, whose axis ends at `high`."""
    along = math.log(tokens / TOKENS[0]) / math.log(TOKENS[-1] / TOKENS[0])
    up = math.log(microseconds / LOW) / math.log(high / LOW)
    bottom = HEIGHT - 48
    return LEFT + panel * (PANEL + GAP) + along * PANEL, bottom - up * (bottom - TOP)


def text(x: float, y: float, said: str, kind: str = "") -> str:
    """Return a text."""
    return f'<text x="{x:.1f}" y="{y:.1f}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{said}</text>'


def grid(panel: int, sequences: int, shown: Sequence[int]) -> list[str]:
    """Return the lines and numbers of a panel's axes."""
    high = shown[-1]
    left, right = place(panel, TOKENS[0], LOW, high)[0], place(panel, TOKENS[-1], LOW, high)[0]
    drawn = [text((left + right) / 2, 28, f"{sequences} sequence{'s' if sequences > 1 else ''}", "head middle")]
    for microseconds in shown:
        y = place(panel, TOKENS[0], microseconds, high)[1]
        drawn += [f'<line class="grid" x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"/>',
                  text(left - 8, y + 4, f"{microseconds:,} µs", "end")]
    bottom = place(panel, TOKENS[0], LOW, high)[1]
    return drawn + [text(place(panel, tokens, LOW, high)[0], bottom + 20, f"{tokens:,}", "middle") for tokens in TOKENS]


def apart(heights: Sequence[float]) -> list[float]:
    """Return heights of labels that keep their order and do not touch."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + LABELS) if found else height)
    return found


def curves(panel: int, sequences: int, found: Times, high: float) -> list[str]:
    """Return the methods' lines, with their names at the ends."""
    ends: list[tuple[float, float, str, str]] = []
    drawn = []
    for method, (name, colour) in (METHODS | OTHERS).items():
        held = [tokens for tokens in TOKENS if method in METHODS or (method, tokens, sequences) in found]
        if not held:
            continue
        points = [place(panel, tokens, found[method, tokens, sequences], high) for tokens in held]
        drawn.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" stroke="{colour}"/>')
        ends.append((points[-1][1], points[-1][0], name, colour))
    for column in sorted({end[1] for end in ends}, reverse=True):  # names stand apart where lines end together
        here = sorted(end for end in ends if end[1] == column)
        for height, (_, x, name, colour) in zip(apart([end[0] for end in here]), here, strict=True):
            drawn.append(f'<text x="{x + 6:.1f}" y="{height + 4:.1f}" style="fill: {colour}">{name}</text>')
    return drawn


def main() -> None:
    """Print the drawing."""
    found = times(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    shown = ticks(found)
    drawn = [line for panel, sequences in enumerate(SEQUENCES)
             for line in (*grid(panel, sequences, shown), *curves(panel, sequences, found, shown[-1]))]
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n<style>{STYLE}</style>')
    print(f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="8"/>')
    print("\n".join(drawn))
    print(text(WIDTH / 2, HEIGHT - 6, "tokens in the cache; time of one step's attention in one layer, H200", "middle"))
    print("</svg>")


if __name__ == "__main__":
    main()

"""Drawings of docs are what their scripts draw of the result lines that there are."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from bench.places import RESULTS, ROOT

POLYLINE, TEXT = ("{http://www.w3.org/2000/svg}" + kind for kind in ("polyline", "text"))


def drawing(*results: Path) -> str:
    command = [sys.executable, ROOT / "tools/draw_attention.py", *results]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def lengths(drawn: str) -> list[int]:
    return [len(one.attrib["points"].split()) for one in ET.fromstring(drawn).iter(POLYLINE)]


def test_attention_is_drawn_as_measured() -> None:
    drawn = drawing()
    assert (ROOT / "docs/kv-attention.svg").read_text() == drawn
    assert lengths(drawn)[:6] == [3] * 6


def test_a_quantized_cache_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    """And the axis holds it: what is 100 times as slow stands higher, within the panel."""
    held = [line for line in (RESULTS / "kv_attention.jsonl").read_text().splitlines() if ":" not in
            json.loads(line)["case"]["method"]]
    bare, more = tmp_path / "bare.jsonl", tmp_path / "more.jsonl"
    bare.write_text("\n".join(held))
    added = [{"case": {"method": "hqq:4", "tokens": tokens, "batch": 1}, "numbers": {"us": 0.3 * tokens}}
             for tokens in (8192, 32768)]
    more.write_text("\n".join([*held, *map(json.dumps, added)]))
    assert lengths(drawing(bare)) == [3] * 12
    root = ET.fromstring(drawing(more))
    assert lengths(drawing(more)) == [3] * 6 + [2] + [3] * 6
    theirs = next(one for one in root.iter(POLYLINE) if len(one.attrib["points"].split()) == 2)
    points = [tuple(map(float, point.split(","))) for point in theirs.attrib["points"].split()]
    lowest = min(float(y) for one in root.iter(POLYLINE) if one is not theirs
                 for y in (point.split(",")[1] for point in one.attrib["points"].split()))
    assert 56 <= points[1][1] < points[0][1] < lowest
    assert [one.text for one in root.iter(TEXT)].count("10,000 µs") == 2

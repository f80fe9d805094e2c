"""Drawings of docs are what their scripts draw of the result lines that there are."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

from bench.places import ROOT


def test_attention_is_drawn_as_measured() -> None:
    command = [sys.executable, ROOT / "tools/draw_attention.py"]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ROOT / "docs/kv-attention.svg").read_text() == drawn.stdout
    root = ET.fromstring(drawn.stdout)
    lines = [one.attrib["points"].split() for one in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [3] * 12

"""The drawing of docs/codecs/trellis.md is what its script draws."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_drawing_is_what_the_script_draws() -> None:
    drawn = subprocess.run([sys.executable, ROOT / "tools/draw_trellis.py"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/codecs/trellis.svg").read_text() == drawn.stdout
    assert ET.fromstring(drawn.stdout).tag.endswith("svg")

"""Package trellis codes in src/tersor/data/trellis.json: add trained filters, and write errors on normal numbers.

    python tools/measure_trellis.py [FILE ...]

Files are those that `tools/train_beam.py` writes. A filter of a rate and window that are there becomes their next
edition, which `tr2x16` then means; payloads of the old one decode with it for ever. The survey of a model tries short
windows in place of long ones and multiplies by the ratio of the errors. Takes a minute.

New codes get a line in tests/codecs/trellis/editions.json, by which a test knows one that has changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tersor.codecs import FoldedTrellis, Trellis
from tersor.codecs.trellis.streamed import Streamed
from tersor.families.trellis import tried_on_normal

PINNED = Path(__file__).parents[1] / "tests" / "codecs" / "trellis" / "editions.json"
FILE = Path(__file__).parents[1] / "src" / "tersor" / "data" / "trellis.json"


def added(text: str, files: list[Path]) -> str:
    """Return the packaged text with the filters of some files behind its own; those that it holds are left out."""
    for file in files:
        held = json.loads(file.read_text())
        one = json.dumps({"shifts": held["shifts"], "taps": held["taps"]}, separators=(",", ":"))
        place = text.index('\n],\n"folded"')
        text = text if f"\n{one}" in text else f"{text[:place]},\n{one}{text[place:]}"
    json.loads(text)
    return text


def every() -> list[Streamed]:
    """Return all packaged codes, along inputs."""
    return [kind(bits, memory, "in", edition) for kind in (Trellis, FoldedTrellis)
            for bits, memory, edition in kind.editions()]


def digests(codecs: list[Streamed]) -> dict[str, str]:
    """Return a digest of what numbers the windows of codes have, by id, rate, window and edition."""
    return {f"{one.id} {one.bits:g}x{one.memory}v{one.edition}":
            hashlib.sha256(json.dumps([one.code.shifts, one.code.weights]).encode()).hexdigest()[:16] for one in codecs}


def measured(text: str) -> str:
    """Return the packaged text with the errors of all its codes; it must be what the package holds."""
    lines = ",\n".join(f'"{codec.spec()}":{tried_on_normal(codec):.9g}' for codec in every())
    codes = text[: text.index(',\n"errors"')] if '"errors"' in text else text.rstrip()[:-1]
    return f'{codes},\n"errors":{{\n{lines}}}}}\n'


def main(files: list[Path]) -> None:
    """Add filters, then measure all codes and write their errors behind the codes."""
    FILE.write_text(added(FILE.read_text(), files))
    whole = measured(FILE.read_text())
    json.loads(whole)
    FILE.write_text(whole)
    pinned = digests(every()) | json.loads(PINNED.read_text())
    PINNED.write_text("{\n" + ",\n".join(f'"{name}": "{digest}"' for name, digest in pinned.items()) + "\n}\n")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])

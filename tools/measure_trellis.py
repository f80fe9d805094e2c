"""Write the relative errors of packaged trellis codes on normal numbers into src/tersor/data/trellis.json.

    python tools/measure_trellis.py

The survey of a model tries short windows in place of long ones and multiplies by the ratio of these errors. To be run
after codes were trained; takes half a minute.
"""

from __future__ import annotations

import json
from pathlib import Path

from tersor.codecs import FoldedTrellis, Trellis
from tersor.families.trellis import tried_on_normal

FILE = Path(__file__).parents[1] / "src" / "tersor" / "data" / "trellis.json"


def main() -> None:
    """Measure all codes and write their errors behind the codes."""
    every = [kind(*one) for kind in (Trellis, FoldedTrellis) for one in kind.packaged()]
    lines = ",\n".join(f'"{codec.spec()}":{tried_on_normal(codec):.9g}' for codec in every)
    text = FILE.read_text()
    codes = text[: text.index(',\n"errors"')] if '"errors"' in text else text.rstrip()[:-1]
    whole = f'{codes},\n"errors":{{\n{lines}}}}}\n'
    json.loads(whole)
    FILE.write_text(whole)


if __name__ == "__main__":
    main()

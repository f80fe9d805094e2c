"""Write the golden fixture of one codec: what this version's files hold, to be decoded by every later version.

    python tools/write_golden.py "rot,lm3" --shape 6x96

makes tests/golden/rotated-v1/rot,lm3/ with config.json, input.npy, payload.safetensors and decoded.npy. A fixture is
evidence: an existing one is never overwritten. After a change of format raise the codec's version and write a new one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from tersor.registry import parse
from tersor.testing import encode, student_t3

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"


def folder_of(text: str, root: Path = FOLDER) -> Path:
    """Return the fixture's folder of a factory string; `;` is spelled `+`, which file systems everywhere accept."""
    codec = parse(text)
    return root / f"{codec.id}-v{codec.to_config()['version']}" / codec.spec().replace(";", "+")


def write(text: str, shape: tuple[int, int], seed: int, root: Path = FOLDER) -> Path:
    """Write the fixture of a factory string; raise FileExistsError if there is one."""
    codec, folder = parse(text), folder_of(text, root)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a golden fixture is never overwritten")
    matrix = student_t3(shape, seed)
    encoded = encode(codec, matrix)
    folder.mkdir(parents=True)
    config = {"codec": codec.to_config(), "shape": list(shape), "spec": codec.spec()}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    np.save(folder / "input.npy", matrix.numpy())
    save_file({k: t.contiguous() for k, t in encoded.tensors.items()}, folder / "payload.safetensors")
    np.save(folder / "decoded.npy", encoded.decode().numpy())
    return folder


def main(arguments: list[str]) -> int:
    """Parse the command line and write one fixture."""
    parser = argparse.ArgumentParser(description="Write the golden fixture of one codec.")
    parser.add_argument("codec", help='factory string, for example "rot,lm3"')
    parser.add_argument("--shape", default="6x96", help="rows x columns (default 6x96)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    rows, columns = map(int, given.shape.split("x"))
    try:
        folder = write(given.codec, (rows, columns), given.seed)
    except FileExistsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

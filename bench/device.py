"""One run on a GPU machine: the tests there, and encoding speed; results go to bench/results/device.jsonl.

PYTHONPATH=src python bench/device.py OUT_FOLDER
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from tersor.quality import measure
from tersor.registry import parse
from tersor.testing import gaussian

ROOT = Path(__file__).parent.parent


def seconds(work, repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    matrix = gaussian((4096, 4096), 0).cuda()
    copy = seconds(matrix.clone)
    lines = []
    for text in ("rot,lm1", "rot,lm2", "rot,lm3", "rot,lm4", "rtn4g64"):
        codec = parse(text)
        encoded = codec.encode(matrix)
        numbers = {"encode_s": seconds(lambda c=codec: c.encode(matrix)), "decode_s": seconds(encoded.decode),
                   "relative_error": measure(matrix, encoded).relative_error, "rate": encoded.rate,
                   "copy_s": copy, "matmul1_s": seconds(lambda e=encoded: e.matmul(matrix[:1]))}
        lines.append({"suite": "device", "case": {"codec": text, "shape": [4096, 4096]}, "bytes": encoded.nbytes,
                      "seed": 0, "commit": commit.stdout.strip(), "machine": torch.cuda.get_device_name(),
                      "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}, "numbers": numbers})
        print(text, numbers)
    Path(sys.argv[1], "device.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()

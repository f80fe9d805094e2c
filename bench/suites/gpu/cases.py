"""Tersor on a GPU: products with one matrix, an 8B-shaped model, its encoding, logits. Results: results/gpu.jsonl.

On the machine with the GPU, from the repository's root (`dev/bnb` holds bitsandbytes, if it was carried):

    PYTHONPATH=src:dev/bnb python3 bench/gpu.py kernels OUT
    PYTHONPATH=src:dev/bnb python3 bench/gpu.py model OUT [--modes compiled graph] [--no-tuned]
    PYTHONPATH=src python3 bench/gpu.py logits OUT
    PYTHONPATH=src python3 bench/gpu.py encode OUT [--all]

OUT/gpu.jsonl gets every line as soon as it is measured, OUT/gpu.failed.txt the tracebacks of what failed. Here, after:
`python bench/gpu.py merge OUT`. Without a GPU the same commands rehearse on tiny shapes; nothing of that is a result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import common
import gpu_run


def kernels(arguments: argparse.Namespace) -> int:
    """Ceilings, products, Hadamard transforms, profiles."""
    import gpu_kernels as suite

    small = not torch.cuda.is_available()
    shapes = [_shape(text) for text in arguments.shapes] or (suite.SMALL["shapes"] if small else suite.SHAPES)
    batches = arguments.batches or (suite.SMALL["batches"] if small else suite.BATCHES)
    codecs = arguments.codecs or suite.CODECS
    ratios = suite.Ratios()
    listed = []
    if "ceilings" in arguments.parts:
        listed += suite.ceiling_cases()
    if "hadamard" in arguments.parts:
        listed += suite.hadamard_cases(suite.SMALL["hadamards"] if small else suite.HADAMARDS)
    if "products" in arguments.parts:
        listed += suite.cases(shapes, batches, codecs)
    run = gpu_run.Run("gpu_kernels", arguments.out, "gpu", limit=arguments.limit, finish=ratios.finish,
                      retry=ratios.retry)
    missed = run.cases(listed) if listed else 0
    if "profile" in arguments.parts:
        run = gpu_run.Run("gpu_kernels", arguments.out, "gpu_profile", limit=arguments.limit)
        missed += run.cases(suite.profile_cases(shapes, batches, [c for c in codecs if c not in ("bf16", "int4")]))
    return missed


def model(arguments: argparse.Namespace) -> int:
    """Tokens a second of an 8B-shaped model."""
    import gpu_model as suite

    listed = suite.cases([*arguments.codecs, *arguments.peers], arguments.layers, arguments.modes, arguments.span,
                         attention=arguments.attention, tuned=arguments.tuned, pdl=arguments.pdl)
    ratios = suite.Ratios()
    return gpu_run.Run("gpu_model", arguments.out, "gpu", limit=arguments.limit, patience=240.0, finish=ratios.finish,
                       retry=suite.retry, options={"store": arguments.store}).cases(listed)


def encode(arguments: argparse.Namespace) -> int:
    """Seconds of encoding an 8B-shaped model."""
    import gpu_encode as suite

    listed = suite.cases(arguments.codec, arguments.sweeps, whole=arguments.all, layers=arguments.layers,
                         most=arguments.most)
    return gpu_run.Run("gpu_encode", arguments.out, "gpu", limit=arguments.limit, patience=240.0,
                       options={"store": arguments.store}).cases(listed)


def logits(arguments: argparse.Namespace) -> int:
    """Logits of fable-22m against the processor's."""
    import gpu_logits as suite

    listed = suite.cases(arguments.codecs or suite.CODECS, arguments.dtypes or suite.DTYPES, arguments.tokens)
    options = {"store": arguments.store, "model": str(arguments.model or suite.FOLDER)}
    return gpu_run.Run("gpu_logits", arguments.out, "gpu", limit=arguments.limit, options=options).cases(listed)


def merge(arguments: argparse.Namespace) -> int:
    """Append the lines of a run elsewhere to bench/results, under the commit here, which it was a copy of."""
    merge_file(arguments.out / "gpu.jsonl", "gpu")
    return 0


def merge_file(file: Path, suite: str) -> None:
    """Append the lines of a file to a suite's results; where the commit is not known, under that of this tree."""
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    with (common.RESULTS / f"{suite}.jsonl").open("a") as handle:
        for line in lines:
            line["suite"] = suite
            line["commit"] = common.commit() if line["commit"] == "unknown" else line["commit"]
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(lines)} lines of {file} appended to bench/results/{suite}.jsonl")


def _shape(text: str) -> tuple[int, int]:
    out, width = text.split("x")
    return int(out), int(width)


def main() -> int:
    """Parse the command line; exit status 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("kernels", help=kernels.__doc__)
    one.set_defaults(run=kernels)
    one.add_argument("--shapes", nargs="*", default=[], metavar="OUTxIN")
    one.add_argument("--batches", nargs="*", type=int, default=[])
    one.add_argument("--codecs", nargs="*", default=[])
    one.add_argument("--parts", nargs="*", default=["ceilings", "hadamard", "products"],
                     choices=("ceilings", "hadamard", "products", "profile"))
    two = verbs.add_parser("model", help=model.__doc__)
    two.set_defaults(run=model)
    two.add_argument("--codecs", nargs="*", default=["rot,lm4", "rot,lm2", "two2x2"])
    two.add_argument("--peers", nargs="*", default=["bf16", "int4", "nf4"])
    two.add_argument("--layers", type=int, default=32)
    two.add_argument("--modes", nargs="*", default=["compiled", "graph"], choices=("compiled", "graph"),
                     help="see gpu_decoder (default: compiled graph)")
    two.add_argument("--span", type=int, default=4, help="layers compiled as one (default: 4)")
    two.add_argument("--attention", default="kernel", choices=("sdpa", "eager", "grouped", "kernel"),
                     help="of all models alike; see gpu_decoder (default: kernel)")
    two.add_argument("--tuned", action=argparse.BooleanOptionalAction, default=True,
                     help="let Inductor tune its kernels and join them (default: yes)")
    two.add_argument("--pdl", action=argparse.BooleanOptionalAction, default=True,
                     help="let Inductor launch its kernels early, triton.enable_pdl (default: yes)")
    three = verbs.add_parser("encode", help=encode.__doc__)
    three.set_defaults(run=encode)
    three.add_argument("--codec", default="two2x2")
    three.add_argument("--sweeps", type=int, default=1000)
    three.add_argument("--layers", type=int, default=32)
    three.add_argument("--all", action="store_true", help="every matrix of the model, into a store")
    three.add_argument("--most", type=float, default=150.0, help="seconds for --all; then it stops with what it has")
    five = verbs.add_parser("logits", help=logits.__doc__)
    five.set_defaults(run=logits)
    five.add_argument("--model", type=Path, help="fable-22m, compressed (default: dev/fable-22m)")
    five.add_argument("--codecs", nargs="*", default=[])
    five.add_argument("--dtypes", nargs="*", default=[], choices=("float32", "float16", "bfloat16"))
    five.add_argument("--tokens", type=int, default=256)
    for verb in (two, three, five):
        verb.add_argument("--store", default="/tmp/tersor-gpu", help="folder for stores (default: /tmp/tersor-gpu)")
    four = verbs.add_parser("merge", help=merge.__doc__)
    four.set_defaults(run=merge)
    for verb in (one, two, three, four, five):
        verb.add_argument("out", type=Path)
    for verb in (one, two, three, five):
        verb.add_argument("--limit", type=float, default=540.0, help="seconds after which no case is begun")
    arguments = parser.parse_args()
    return 1 if arguments.run(arguments) else 0


if __name__ == "__main__":
    sys.exit(main())

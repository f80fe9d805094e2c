"""A checkpoint of Llama 3.1 8B's shape in bf16 shards, of random weights; what memory the command takes that reads it.

Of all 32 blocks it takes 16 GB of disk, and the file half of that, twice for a while.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from bench.places import ROOT
from bench.suite import Asked, Outcome, Result, Unmeasured
from bench.suites.serving.cases import Shards
from tersor.store.manifest import INDEX

WIDTH, INNER, HEADS, GROUPS, HEAD, WORDS = 4096, 14336, 32, 8, 128, 128256
SCALE = 0.02  # standard deviation of a weight
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FABLE = ROOT / "examples" / "fable-7m"


def measure(cases: Sequence[Shards], asked: Asked) -> Iterator[Outcome]:
    """Yield every case; the command runs in a process of its own, whose memory it tells."""
    del asked
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            yield _measured(case, Path(folder))


def _measured(case: Shards, folder: Path) -> Outcome:
    parameters, out = write(folder / "model", case.blocks, FABLE), folder / "out.gguf"
    began = time.perf_counter()
    command = [sys.executable, "-m", "tersor", "gguf", str(folder / "model"), str(out), "--rate", str(case.rate),
               "--types", case.types, "--effort", "fast", "--uncalibrated", "--evaluation-tokens", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Unmeasured(case.key, done.stderr.strip().splitlines()[-1], failed=True)
    told = json.loads(done.stdout)
    peak = told["peak_memory_bytes"]
    return Result.of(case, out.stat().st_size, {
        "peak_bytes": peak, "parameters": parameters, "seconds": time.perf_counter() - began, "types": told["types"],
        "passed": peak <= case.most})


def write(folder: Path, blocks: int, tokenizer: Path) -> int:
    """Write a model of some blocks, a shard for each of them; return the number of its parameters.

    Parameters
    ----------
    tokenizer : Path
        A folder with the files of one; tokens that it does not know are unused.
    """
    folder.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, head_dim=HEAD,
                         num_key_value_heads=GROUPS, vocab_size=WORDS, num_hidden_layers=blocks, dtype="bfloat16",
                         max_position_embeddings=131072, rope_theta=5e5, tie_word_embeddings=False, bos_token_id=0,
                         eos_token_id=0, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    elements = nbytes = 0
    for number, shapes in enumerate(_shards(blocks)):
        tensors = {name: _drawn(shape, generator) for name, shape in shapes.items()}
        file = f"model-{number + 1:05d}-of-{blocks + 2:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        elements += sum(tensor.numel() for tensor in tensors.values())
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return elements


def _shards(blocks: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard: the embedding, the blocks, the head with the last norm."""
    yield {"model.embed_tokens.weight": (WORDS, WIDTH)}
    inner = {"q_proj": HEADS * HEAD, "k_proj": GROUPS * HEAD, "v_proj": GROUPS * HEAD}
    for block in range(blocks):
        at = f"model.layers.{block}"
        yield {**{f"{at}.self_attn.{name}.weight": (rows, WIDTH) for name, rows in inner.items()},
               f"{at}.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
               f"{at}.mlp.gate_proj.weight": (INNER, WIDTH), f"{at}.mlp.up_proj.weight": (INNER, WIDTH),
               f"{at}.mlp.down_proj.weight": (WIDTH, INNER),
               f"{at}.input_layernorm.weight": (WIDTH,), f"{at}.post_attention_layernorm.weight": (WIDTH,)}
    yield {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return Gaussian weights; ones for a norm."""
    empty = torch.empty(shape, dtype=torch.bfloat16)
    return empty.fill_(1.0) if len(shape) == 1 else empty.normal_(0.0, SCALE, generator=generator)

"""The eight matrices of the QET grid, float32 (rows, columns), each from a fixed seed or a fixed slice of a real model.

Keys and values come from one run of SmolLM2-135M over two windows of held-out text; that run takes seconds and is
cached in `out/`, which git ignores. Per-element bits of product quantization depend on the number of rows: codebooks
are shared by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench import evaluation, models
from bench.places import held_out, kept
from tersor import testing

SEED = 0
LAYER = 3  # of MiniLM's six
KV_LAYER = 15  # of SmolLM2's thirty
KV_WINDOW = 2048  # tokens, from the beginning of each text
KV_TEXTS = ("fiction", "technical")
EMBEDDINGS = slice(2000, 10192)  # word pieces; the first ids of the vocabulary are unused or single characters


def gaussian1024() -> Tensor:
    """Return 1024 x 128 independent normal numbers."""
    return testing.gaussian((1024, 128), SEED)


def gaussian4096() -> Tensor:
    """Return 4096 x 128 independent normal numbers."""
    return testing.gaussian((4096, 128), SEED)


def t3_4096() -> Tensor:
    """Return 4096 x 128 independent Student t numbers of 3 degrees of freedom, of unit variance."""
    return testing.student_t3((4096, 128), SEED, unit_variance=True)


def minilm(name: str) -> Tensor:
    """Return a matrix of all-MiniLM-L6-v2."""
    from safetensors import safe_open

    with safe_open(models.minilm_safetensors(), "pt") as file:
        return file.get_tensor(name).to(torch.float32).contiguous()


def wq() -> Tensor:
    """Return the query projection of MiniLM, layer 3: 384 x 384."""
    return minilm(f"encoder.layer.{LAYER}.attention.self.query.weight")


def wff() -> Tensor:
    """Return the first feed-forward matrix of MiniLM, layer 3: 1536 x 384."""
    return minilm(f"encoder.layer.{LAYER}.intermediate.dense.weight")


def embedding() -> Tensor:
    """Return 8192 rows of MiniLM's word embedding: 8192 x 384."""
    return minilm("embeddings.word_embeddings.weight")[EMBEDDINGS].contiguous()


def keys() -> Tensor:
    """Return the keys of SmolLM2-135M, layer 15, as cached (rotated by position): 4096 x 192."""
    return key_value_run()["keys"]


def keys_unrotated() -> Tensor:
    """Return the same keys before the rotation by position: 4096 x 192."""
    return key_value_run()["keys_unrotated"]


def values() -> Tensor:
    """Return the values of SmolLM2-135M, layer 15: 4096 x 192."""
    return key_value_run()["values"]


MATRICES: Mapping[str, Callable[[], Tensor]] = {
    "gaussian1024": gaussian1024, "gaussian4096": gaussian4096, "t3_4096": t3_4096, "minilm_wq": wq,
    "minilm_wff": wff, "minilm_embedding": embedding, "keys": keys, "values": values,
}


def key_value_run() -> dict[str, Tensor]:
    """Return keys, unrotated keys and values of one layer, (tokens, heads x head size); cached after the first run."""
    from safetensors.torch import load_file, save_file

    file = kept("qet") / f"smollm2-layer{KV_LAYER}-{KV_WINDOW}.safetensors"
    if not file.is_file():
        save_file(_run_smollm2(), file)
    return load_file(file)


def _run_smollm2() -> dict[str, Tensor]:
    path = models.smollm2_gguf()
    model, tokenizer = evaluation.load_model(path), evaluation.load_tokenizer(path)
    projected: list[Tensor] = []
    hook = model.model.layers[KV_LAYER].self_attn.k_proj.register_forward_hook(
        lambda _module, _inputs, output: projected.append(output[0]))
    keys, values = [], []
    with torch.no_grad():
        for text in KV_TEXTS:
            ids = tokenizer(held_out(text), verbose=False)["input_ids"][:KV_WINDOW]
            layer = model.model(torch.tensor([ids]), use_cache=True).past_key_values.layers[KV_LAYER]
            keys.append(_tokens_by_channels(layer.keys))
            values.append(_tokens_by_channels(layer.values))
    hook.remove()
    return {"keys": torch.cat(keys), "values": torch.cat(values), "keys_unrotated": torch.cat(projected)}


def _tokens_by_channels(cached: Tensor) -> Tensor:
    """Return (1, heads, tokens, size) as (tokens, heads x size)."""
    return cached[0].transpose(0, 1).flatten(1).to(torch.float32).contiguous()

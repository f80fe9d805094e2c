"""GPTQ of llm-compressor: run in `.venv-peers/calibrated`, not imported.

Its only argument is a JSON object: `model`, a transformers directory; `ids`, an .npy file of token ids (windows,
context); `bits` and `group`; `out`, a new directory. All settings but the bits are the tool's own: min-max scales,
symmetric, `actorder=static`, damping .01. `out` is in the format of compressed-tensors, as the tool writes it.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main(job: dict) -> None:
    """Quantize a model."""
    windows = np.load(job["ids"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    weights = QuantizationArgs(num_bits=job["bits"], type="int", symmetric=True, strategy="group",
                               group_size=job["group"])
    recipe = GPTQModifier(config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)},
                          ignore=["lm_head"])
    texts = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()})
    oneshot(model=model, dataset=texts, recipe=recipe, max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows), shuffle_calibration_samples=False)
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

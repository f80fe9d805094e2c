"""AutoRound of Intel: run in `.venv-peers/calibrated`, not imported.

Its only argument is a JSON object: `model`, a transformers directory; `ids`, an .npy file of token ids (windows,
context); `bits`, `group` and `iters`; `out`, a new directory. Settings are the tool's own but for those, and batches of
8 windows. `out` holds the weights as they decode, in float32: what it saves for servers is the same numbers, packed.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main(job: dict) -> None:
    """Quantize a model."""
    windows = torch.from_numpy(np.load(job["ids"]))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in windows.split(BATCH)]
    tool = AutoRound(model, tokenizer, bits=job["bits"], group_size=job["group"], sym=True, iters=job["iters"],
                     seqlen=windows.shape[1], nsamples=len(windows), batch_size=BATCH, dataset=batches,
                     device_map="cpu", enable_torch_compile=False)
    model, _ = tool.quantize()
    model.save_pretrained(job["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""llama.cpp's quantizer and its logits: run in `.venv-peers/llama`, not imported.

Its only argument is a JSON object. To quantize: `source`, a .gguf file in bf16; `importance`, an .npz file of mean
squared inputs by tensor; `ftype`, as `llama_cpp` calls it, such as `Q2_K`; `pure`, whether all tensors get the same
type; `out`. That is `llama-quantize --imatrix`, by the function behind the program. For logits: `model`, a .gguf file;
`ids`, an .npy file of token ids (windows, context); `out`, an .npy file (windows, context, vocabulary), float32.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def quantize(job: dict) -> None:
    """Write a quantized file."""
    held = dict(np.load(job["importance"]))
    rows = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in held.items()}
    listed = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()  # the last one, without a name, ends it
    for place, (name, values) in zip(listed, rows.items(), strict=False):
        place.name, place.size = name.encode(), values.size
        place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.nthread, wanted.pure = 1, job["pure"]
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['ftype']}")
    wanted.imatrix = ctypes.cast(listed, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(job["source"].encode(), job["out"].encode(), ctypes.byref(wanted))
    if failed:
        raise SystemExit(f"llama_model_quantize: status {failed}")


def logits(job: dict) -> None:
    """Write a model's logits."""
    windows = np.load(job["ids"])
    context = windows.shape[1]
    model = llama_cpp.Llama(job["model"], n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=1,
                            n_threads_batch=1)
    found = np.lib.format.open_memmap(job["out"], "w+", np.float32, (*windows.shape, model.n_vocab()))
    for number, window in enumerate(windows):
        model.reset()
        model.eval(window.tolist())
        found[number] = model.scores[:context]
    found.flush()


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    (quantize if "ftype" in told else logits)(told)

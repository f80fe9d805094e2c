"""Short fine-tunes by `transformers.Trainer`: LoRA on all linears, on a text of a kind that the model has not seen.

The text is the source of `torch.nn.functional`, which every machine has; its end is set apart. Losses of training and
of that end go into the result line, with the processor time of it all.
"""

from __future__ import annotations

import hashlib
import inspect
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from bench.models import locate
from bench.places import kept
from bench.suite import Asked, Outcome, Result
from bench.suites.adapters.cases import AdapterCase
from tersor import store
from tersor.hf import compress_model
from tersor.hf.adapters import initialize

CONTEXT, APART, STEPS, BATCH, RANK = 256, 16, 40, 4, 8
Example = dict[str, torch.Tensor]


def run(case: AdapterCase, original: Path, device: str) -> tuple[dict[str, Any], int]:
    """Return the curves of one case, and the bytes of its weights."""
    folder = original if case.rate is None else compressed(case, original, device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(model.to(device), LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    told = initialize(tuned, original) if case.begun else {}
    examples, digest = windows(original)
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, seed=0,
            learning_rate=1e-3, warmup_steps=4, lr_scheduler_type="cosine", logging_steps=5, eval_strategy="steps",
            eval_steps=10, eval_on_start=True, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=device == "cpu", dataloader_pin_memory=False)
        trainer = Trainer(tuned, arguments, train_dataset=examples[:-APART], eval_dataset=examples[-APART:])
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    lines = trainer.state.log_history
    errors = {when: sum(line[when] ** 2 for line in told.values()) / len(told) for when in ("before", "after") if told}
    return {"trained": [line["loss"] for line in lines if "loss" in line],
            "apart": [line["eval_loss"] for line in lines if "eval_loss" in line], "processor_s": seconds,
            "text": digest, **errors}, 0 if case.rate is None else store.stored_nbytes(folder)


def windows(original: Path) -> tuple[list[Example], str]:
    """Return the text in windows, and its digest."""
    text = inspect.getsource(torch.nn.functional)
    ids = torch.tensor(AutoTokenizer.from_pretrained(original)(text).input_ids)
    whole = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in whole], hashlib.sha256(text.encode()).hexdigest()[:16]


def compressed(case: AdapterCase, original: Path, device: str) -> Path:
    """Return the store of a case, made once."""
    folder = kept("adapters") / f"{case.model}-{case.rate:g}"
    if not folder.exists():
        compress_model(original, folder, case.rate, evaluation_tokens=0, device=device)
    return folder


def measure(cases: Sequence[AdapterCase], asked: Asked) -> Iterator[Outcome]:
    """Yield every case."""
    name = "" if asked.device == "cpu" else torch.cuda.get_device_name()
    for case in cases:
        numbers, nbytes = run(case, locate(case.model, asked.models), asked.device)
        yield Result.of(case, nbytes, numbers, device=name)

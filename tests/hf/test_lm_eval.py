"""lm-eval loads what `compress` writes without a flag, and finds what plain log-probabilities say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tersor.hf.compress.run import compress_model
from tests.fable import FABLE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                                                   reason="lm-eval is not installed here")]
PAIRS = (("The cat sat on the mat.", "The cat sit on the mats."), ("She has gone home.", "She have gone home."),
         ("They were late again.", "They was late again."), ("He saw himself there.", "He saw itself there."),
         ("No one ever said so.", "Anyone ever said so."), ("The ships are old.", "The ships is old."),
         ("I know what he did.", "I know what did he."), ("A dog barks.", "A dog bark."))
TASK = """
task: pairs
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
target_delimiter: ""
doc_to_choice: "{{{{[good, bad]}}}}"
metric_list:
  - metric: acc
"""


def by_hand(folder: Path) -> float:
    """Return the share of pairs whose first sentence is the likelier, after the token that begins a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def chance(text: str) -> float:
        ids = torch.tensor([[first, *tokenizer(text, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            logits = torch.log_softmax(model(ids).logits[0, :-1], -1)
        return float(logits.gather(-1, ids[0, 1:, None]).sum())
    return sum(chance(good) > chance(bad) for good, bad in PAIRS) / len(PAIRS)


def test_it_finds_what_log_probabilities_say(tmp_path: Path) -> None:
    compress_model(FABLE, tmp_path / "out", 24, method="rot,lm4", calibrated=False, evaluation_tokens=0)
    tasks, found = tmp_path / "tasks", tmp_path / "found"
    tasks.mkdir()
    lines = [json.dumps({"good": good, "bad": bad}) for good, bad in PAIRS]
    (tasks / "pairs.jsonl").write_text("\n".join(lines))
    (tasks / "pairs.yaml").write_text(TASK.format(file=tasks / "pairs.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'out'}",
               "--include_path", str(tasks), "--tasks", "pairs", "--output_path", str(found), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(next(found.rglob("results*.json")).read_text())["results"]["pairs"]
    assert told["acc,none"] == pytest.approx(by_hand(tmp_path / "out"))

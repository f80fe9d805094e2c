"""Example inputs for classes of many kinds, from their configuration alone; what a pass does not reach is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from tersor.errors import ModelError
from tersor.hf.models.inputs import example_inputs, reach, run

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
PAIR = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 8}


def llava() -> Any:
    return T.LlavaForConditionalGeneration(T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SIGHT), text_config=T.LlamaConfig(**TEXT), image_token_index=63,
        vision_feature_layer=-1))


CLASSES = {
    "text": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT)), {"input_ids"}),
    "base": (lambda: T.BertModel(T.BertConfig(**TEXT)), {"input_ids"}),
    "classifier": (lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**TEXT)), {"input_ids"}),
    "classifier of ends": (lambda: T.BartForSequenceClassification(T.BartConfig(**PAIR)),
                           {"input_ids", "decoder_input_ids"}),
    "choices": (lambda: T.BertForMultipleChoice(T.BertConfig(**TEXT)), {"input_ids"}),
    "encoder-decoder": (lambda: T.T5ForConditionalGeneration(T.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)), {"input_ids", "decoder_input_ids"}),
    "speech": (lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(
        **PAIR, num_mel_bins=16, max_source_positions=32, max_target_positions=32)),
        {"input_features", "decoder_input_ids"}),
    "sound": (lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**TEXT, conv_dim=[16] * 7, num_conv_pos_embedding_groups=2,
                                                       num_conv_pos_embeddings=8)), {"input_values"}),
    "pictures": (lambda: T.ViTModel(T.ViTConfig(**SIGHT)), {"pixel_values"}),
    "pairs": (lambda: T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=SIGHT, projection_dim=16)),
              {"input_ids", "pixel_values"}),
    "pictures and text": (llava, {"input_ids"}),
}


def made(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLASSES[name][0]().eval()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_runs_on_its_example_inputs(name: str) -> None:
    model, state = made(name), torch.random.get_rng_state()
    inputs = example_inputs(model)
    assert {key for key, value in inputs.items() if isinstance(value, torch.Tensor)} == CLASSES[name][1]
    outputs = run(model, inputs)
    assert outputs
    assert all(torch.isfinite(value).all() for value in outputs.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    again = example_inputs(model)
    assert all(torch.equal(inputs[key], again[key]) for key in CLASSES[name][1])


def test_text_does_not_reach_a_tower() -> None:
    model = made("pictures and text")
    inputs = example_inputs(model)
    assert 63 not in inputs["input_ids"]  # which would stand for a picture
    assert reach(model, inputs)[1] == ["model.vision_tower"]
    assert reach(made("text"), inputs)[1] == []


def test_a_class_that_runs_on_nothing_known_is_named() -> None:
    class Odd(T.PreTrainedModel):
        config_class = T.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = nn.Linear(2, 2)

        def forward(self, spectrum: torch.Tensor) -> torch.Tensor:
            return self.inner(spectrum)

    with pytest.raises(ModelError, match=r"Odd runs on none .* missing 1 required"):
        example_inputs(Odd(T.LlamaConfig(**TEXT)))

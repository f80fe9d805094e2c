"""Fixtures of the cache tests: each model, and each way to attend."""


import pytest
from transformers import PreTrainedModel

from tersor.hf.kv.attention import register_attention
from tests.hf.kv.sharp import NAMES, tiny


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture(params=["sdpa", "tersor"])
def attention(request: pytest.FixtureRequest) -> str:
    register_attention()
    return request.param

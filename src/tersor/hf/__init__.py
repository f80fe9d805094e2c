"""transformers integration: importing this registers Tersor's quantizer, so that `from_pretrained` can load models."""

from tersor.hf.attention import register_attention
from tersor.hf.cache import CompressedCache
from tersor.hf.evaluate import evaluate
from tersor.hf.kvplan import PlanSettings, plan_cache
from tersor.hf.quantizer import TersorConfig, TersorQuantizer
from tersor.hf.run import Settings, compress_model
from tersor.hf.verify import verify

__all__ = ["CompressedCache", "PlanSettings", "Settings", "TersorConfig", "TersorQuantizer", "compress_model",
           "evaluate", "plan_cache", "register_attention", "verify"]

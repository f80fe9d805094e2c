"""transformers integration: importing this registers Tersor's quantizer, so that `from_pretrained` can load models."""

from tersor.hf.compress.recover import RecoverSettings, recover_model
from tersor.hf.compress.run import CompressSettings, compress_model
from tersor.hf.compress.verify import verify
from tersor.hf.kv.attention import register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.plan import PlanSettings, plan_cache
from tersor.hf.models.evaluate import evaluate
from tersor.hf.models.quantizer import TersorConfig, TersorQuantizer

__all__ = ["CompressSettings", "CompressedCache", "PlanSettings", "RecoverSettings", "TersorConfig", "TersorQuantizer",
           "compress_model", "evaluate", "plan_cache", "recover_model", "register_attention", "verify"]

"""transformers integration: importing this registers Tersor's quantizer, so that `from_pretrained` can load models."""

from tersor.hf.evaluate import evaluate
from tersor.hf.quantizer import TersorConfig, TersorQuantizer
from tersor.hf.run import Settings, compress_model
from tersor.hf.verify import verify

__all__ = ["Settings", "TersorConfig", "TersorQuantizer", "compress_model", "evaluate", "verify"]

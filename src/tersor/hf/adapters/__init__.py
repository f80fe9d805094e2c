"""Adapters (LoRA, by the library `peft`) beside encoded weights: prepared for, begun well, and merged.

`peft` itself needs nothing of this: to it, modules of a loaded model are linears and embeddings.
"""

from tersor.hf.adapters.initialize import initialize
from tersor.hf.adapters.merge import merge
from tersor.hf.adapters.prepare import prepare_for_training

__all__ = ["initialize", "merge", "prepare_for_training"]

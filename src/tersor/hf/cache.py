"""Where `CompressedCache` was before the packages of `tersor.hf`; scripts still name it."""

from tersor.hf.kv.cache import CompressedCache

__all__ = ["CompressedCache"]

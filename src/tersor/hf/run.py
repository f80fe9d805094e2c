"""Where `compress_model` was before the packages of `tersor.hf`; scripts still name it."""

from tersor.hf.compress.run import CompressSettings, compress_model

__all__ = ["CompressSettings", "compress_model"]

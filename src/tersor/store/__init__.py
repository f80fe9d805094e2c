"""The file format: a directory of safetensors shards and one manifest, `tersor.json`. See docs/format.md."""

from tersor.store.manifest import DTYPES, FORMAT_VERSION, INDEX, MANIFEST, Entry, predict_nbytes
from tersor.store.reading import Store, params, read
from tersor.store.writing import stored_nbytes, write

__all__ = ["DTYPES", "Entry", "FORMAT_VERSION", "INDEX", "MANIFEST", "Store", "params", "predict_nbytes", "read",
           "stored_nbytes", "write"]

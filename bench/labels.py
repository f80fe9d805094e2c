"""How tables name methods."""

from __future__ import annotations

import re

PEER_NAMES = {"nf4": "bitsandbytes NF4, block", "hqq": "HQQ", "quanto": "quanto", "torchao": "torchao", "gguf": "GGUF",
              "faiss": "FAISS"}


def label(method: str) -> str:
    """Return how a table names a method."""
    head, _, rest = method.partition(":")
    if method == "original":
        return "original, bf16"
    if head == "pipeline":
        family, _, effort = rest.partition("@")
        told = (f", `{family}`" if family else "") + (f", effort {effort}" if effort else "")
        return f"**Tersor**, calibrated and planned{told}"
    if method.startswith("tersor:qet@"):
        return "QET as published, plain"
    if head == "tersor":
        return f"**Tersor** `{rest.split('@')[0]}`, plain"
    if rest:
        words = re.sub(r"^(\d+)g(\d+)(\w*)$", r"\1-bit, group \2 \3", rest).strip()
        words = re.sub(r"^eden(\d)$", r"EDEN \1-bit", words).replace(" hqq", ", HQQ optimizer")
        return f"{PEER_NAMES[head]} {words.upper() if words == 'sq4' else words}"
    if method.startswith("rtn"):
        bits, group = method.removeprefix("rtn").split("g")
        return f"round to nearest {bits}-bit, group {group}"
    return f"**Tersor** `{method}`" if method.startswith("rot,") else f"Tersor `{method}`"

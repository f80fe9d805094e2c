"""`compress --format`: the verbs that write what others serve, by the name of their format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.gguf import gguf
from tersor.cli.packed import compressed_tensors
from tersor.errors import CodecConfigError
from tersor.files import read_json

OWN, GGUF, PACKED = FORMATS = ("tersor", "gguf", "compressed-tensors")
FileFormat = Annotated[str, typer.Option("--format", help="tersor, a directory for transformers; gguf, a file for "
                                         "llama.cpp, as `tersor gguf` writes it; or compressed-tensors, a directory "
                                         "for vLLM, as `tersor compressed-tensors` does")]
ONLY_PACKED = ("leave_out", "device", "whole_model")  # options that `gguf` has not


def format_of(path: Path) -> str:
    """Return the format of what a path holds: that of others by a file's name or what `config.json` says, or ours."""
    if path.suffix == ".gguf" and path.is_file():
        return GGUF
    try:
        told = read_json(path / "config.json")
        return PACKED if told["quantization_config"]["quant_method"] == PACKED else OWN
    except (OSError, ValueError, LookupError, TypeError):
        return OWN


def compress_to(name: str, where: tuple[Path, Path], given: Mapping[str, Any], unread: Mapping[str, Any]) -> None:
    """Run the verb of a format.

    Parameters
    ----------
    where : (Path, Path)
        Source and output.
    given : mapping
        Options by their names in Python.
    unread : mapping
        Those that no such verb reads, as they are written, and whether they were given.

    Raises
    ------
    CodecConfigError
        If there is no such format, or its verb does not read an option that was given.
    """
    if name not in FORMATS:
        raise CodecConfigError(f"--format '{name}': expected one of {', '.join(FORMATS)}")
    odd = [option for option, used in unread.items() if used]
    options = dict(given)
    if name == GGUF:
        odd += [f"--{key.replace('_', '-')}" for key in ONLY_PACKED if options.pop(key) not in (None, False, "cpu")]
    if odd:
        raise CodecConfigError(f"{' and '.join(odd)}: of no use to --format {name}; leave out, or see 'tersor {name} "
                               "--help'")
    (gguf if name == GGUF else compressed_tensors)(*where, **options)

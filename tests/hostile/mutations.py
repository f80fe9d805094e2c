"""Damage: to bytes, to folders, and to what JSON and safetensors say; and signatures made anew, as attackers do."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tersor.files import save_sealed
from tersor.store.embedded import KEY
from tersor.store.manifest import MANIFEST, body_digest, digest, file_digest, pack

Draw = random.Random
ODD: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2, 3, 7, 16, 64, 255, 4096, 2**31, 2**53 + 1, 2**63, 10**30,
                        -(2**63), 0.0, -0.5, 0.5, 1.5, 2.0, 16.0, 1e30, 1e308, math.nan, math.inf, -math.inf, "", "0",
                        "32", "nan", "..", "../x", "/etc/passwd", "a/b", "\0", "é", "\ud800", "x" * 3000, [], {}, [[]],
                        [None], [1, 2], {"a": 1}, {"id": "scalar"}, [[[[[[[[]]]]]]]], "rot,lm3", "lr1(fp32;fp32)",
                        "bf16", "model.safetensors", "float64", "bool", "int64", "BF16", "F8_E4M3")
NUMBERS = (0, 1, 3, 8, 64, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64, 10**6, 10**12)
PEAKS = (3e38, 1e38, -3e38, 2.0**100, 1e20, 65504.0, 1e-38, 1e-45, -0.0)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def change_json(value: Any, draw: Draw) -> Any:
    """Return a JSON value with one to three values replaced, removed, renamed, repeated or added."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return copy.deepcopy(draw.choice(ODD))
        path = draw.choice(found)
        parent, key, how = _at(value, path[:-1]), path[-1], draw.randrange(9)
        old = parent[key]
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):
            parent[draw.choice((f"{key}x", "", "0", "../x", "layers"))] = old
            del parent[key]
        elif how == 2:
            parent[key] = copy.deepcopy(_at(value, draw.choice(found)))
        elif how == 3 and isinstance(old, list):
            old.extend(copy.deepcopy(old) or [1])
        elif how == 4 and isinstance(old, (int, float)) and math.isfinite(old):
            parent[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old), [old]))
        elif how == 5 and isinstance(parent, dict):
            parent[draw.choice(("extra", "shared", "codec", "shard", "dtype"))] = copy.deepcopy(draw.choice(ODD))
        elif how == 6 and isinstance(old, int):
            parent[key] = draw.choice(NUMBERS)
        else:
            parent[key] = copy.deepcopy(draw.choice(ODD))
    return value


def change_text(text: str, draw: Draw) -> str:
    """Return JSON text, changed as a value or as text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text + draw.choice(("x", "{", "\0"))
    how = draw.randrange(12)
    if how == 0:
        return draw.choice(("[" * 100000, '{"a":' * 50000, "9" * 6000, "", "null", "[]", "{}", "1e999",
                            text[: len(text) // 2], text + text, "\ufeff" + text))
    return json.dumps(change_json(value, draw), ensure_ascii=draw.random() < 0.9)


def write_text(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def change_bytes(data: bytes, draw: Draw) -> bytes:
    """Return bytes with some flipped, cut off, added, zeroed or repeated."""
    out, how = bytearray(data), draw.randrange(8)
    if not out:
        return draw.randbytes(9)
    place = draw.choice((0, draw.randrange(len(out)), draw.randrange(min(len(out), 200))))
    if how <= 2:
        for _ in range(draw.choice((1, 1, 4, 30))):
            within = len(out) if draw.random() < 0.5 else min(len(out), 300)
            out[draw.randrange(within)] ^= 1 << draw.randrange(8)
    elif how == 3:
        del out[place:]
    elif how == 4:
        out[place:place] = draw.randbytes(draw.choice((1, 8, 1000)))
    elif how == 5:
        out[place : place + draw.choice((1, 8, 64))] = draw.choice((b"\0", b"\xff")) * draw.choice((1, 8, 64))
    elif how == 6:
        out += out[place:]
    else:
        out[place : place + 8] = struct.pack("<Q", draw.choice((2**63, 2**40, 100, 0, 2**64 - 1)))
    return bytes(out)


def change_header(data: bytes, draw: Draw) -> bytes:
    """Return a safetensors file whose header was changed, its length right."""
    (length,) = struct.unpack("<Q", data[:8])
    text = change_text(data[8 : 8 + length].decode(), draw).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def change_tensors(file: Path, draw: Draw) -> None:
    """Rewrite a safetensors file with tensors of huge, tiny, random or no numbers, other shapes or dtypes."""
    head, _ = _split(file.read_bytes())
    tensors = load_file(file)
    for _ in range(draw.choice((1, 1, 2, 5))):
        floats = [name for name, t in tensors.items() if t.is_floating_point()]
        name = draw.choice(floats if floats and draw.random() < 0.7 else list(tensors))
        old = tensors[name]
        flat = old.reshape(-1).clone()
        how = draw.randrange(20)
        if how == 0:
            tensors[name] = old.to(draw.choice((torch.float32, torch.float64, torch.int32, torch.bfloat16,
                                                torch.uint8)))
        elif how == 1:
            tensors[name] = draw.choice((flat[: len(flat) // 2], flat, torch.cat([flat, flat]), old.unsqueeze(0),
                                         old[:0] if old.ndim else flat)).clone()
        elif how == 2 and name in tensors and len(tensors) > 1:
            del tensors[name]
        elif flat.is_floating_point() and len(flat):
            peak = draw.choice((*PEAKS, math.nan, math.inf)) if how < 6 else draw.choice(PEAKS)
            chosen = slice(None) if how % 2 else slice(0, draw.randrange(1, len(flat) + 1))
            flat[chosen] = torch.tensor(peak, dtype=torch.float64).to(flat.dtype)
            tensors[name] = flat.reshape(old.shape)
        elif len(flat):
            kind = draw.randrange(3)
            flat[:] = 0 if kind == 0 else (255 if flat.dtype == torch.uint8 else torch.iinfo(flat.dtype).max if
                                           flat.dtype != torch.bool else 1)
            if kind == 2:
                generator = torch.Generator().manual_seed(draw.randrange(2**31))
                most = 256 if flat.dtype == torch.uint8 else 2
                flat[:] = torch.randint(most, flat.shape, generator=generator).to(flat.dtype)
            tensors[name] = flat.reshape(old.shape)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, head.get("__metadata__"))


def damage(folder: Path, draw: Draw, *, signed: bool) -> str:
    """Damage one file of a folder, or the folder; return what was done.

    What is `signed` anew keeps its form more often than not: else it hardly gets beyond the first check.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    texts = [p for p in files if p.suffix in (".json", ".jsonl")]
    file = draw.choice(texts if texts and draw.random() < 0.4 else files)
    how = draw.random()
    if signed and file.suffix == ".safetensors" and how < 0.8:
        how = 0.5
    if how < 0.08:
        return _damage_folder(folder, file, files, draw)
    if file.suffix == ".safetensors" and how < 0.75:
        try:
            if how < 0.35:
                file.write_bytes(change_header(file.read_bytes(), draw))
                return f"header of {file.name}"
            change_tensors(file, draw)
            return f"tensors of {file.name}"
        except (SafetensorError, ValueError, TypeError, OverflowError, RuntimeError):
            pass
    if file.suffix == ".json" and how < 0.85:
        write_text(file, change_text(file.read_text(), draw))
        return f"values of {file.name}"
    if file.suffix == ".jsonl" and how < 0.85:
        lines = file.read_text().split("\n")
        place = draw.randrange(len(lines))
        lines[place] = change_text(lines[place], draw)
        write_text(file, "\n".join(lines))
        return f"lines of {file.name}"
    file.write_bytes(change_bytes(file.read_bytes(), draw))
    return f"bytes of {file.name}"


def _damage_folder(folder: Path, file: Path, files: list[Path], draw: Draw) -> str:
    how = draw.randrange(6)
    if how == 0:
        file.unlink()
    elif how == 1:
        shutil.copyfile(file, file.with_name(f"copy-{file.name}"))
    elif how == 2:
        shutil.copyfile(draw.choice(files), folder / "stray.safetensors")
    elif how == 3:
        file.write_bytes(b"")
    elif how == 4:
        file.unlink()
        file.mkdir()
    else:
        other = draw.choice(files)
        if other != file:
            shutil.copyfile(other, file)
    return f"folder {how}: {file.name}"


def sign_store(folder: Path) -> None:
    """Make the digests of the store in a folder right again, as far as it can be read."""
    file = next(folder.rglob(MANIFEST), folder / MANIFEST)
    folder = file.parent
    manifest = _object(file)
    if manifest is None:
        return
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        _quietly(lambda shard=shard: tensors.update(load_file(shard)))
    for group in ("matrices", "plain"):
        records = manifest.get(group)
        for name, record in (records.items() if isinstance(records, dict) else ()):
            _quietly(lambda name=name, record=record: record.update(sha256=_digest(tensors, name, record)))
    files = manifest.get("files")
    for name in list(files) if isinstance(files, dict) else ():
        _quietly(lambda name=name: files.update({name: file_digest(folder / name)}))
    manifest.pop("sha256", None)
    manifest["sha256"] = body_digest(manifest)
    write_text(file, json.dumps(manifest))
    _quietly(lambda: _sign_copy(folder / manifest["shards"][-1], manifest))


def _sign_copy(shard: Path, manifest: dict[str, Any]) -> None:
    """Put the manifest into the last shard again, if there was one."""
    header, payload = _split(shard.read_bytes())
    if KEY in header["__metadata__"]:
        header["__metadata__"][KEY] = pack(manifest)
        text = json.dumps(header).encode()
        shard.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the payload of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _digest(tensors: dict[str, torch.Tensor], name: str, record: dict[str, Any]) -> str:
    own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
    own |= {key: tensors[place] for key, place in record.get("shared", {}).items()}
    return digest(own if "codec" in record else {"": tensors[name]})


def sign_sealed(folder: Path) -> None:
    """Make the digest of sealed files right again."""
    for file in folder.glob("*.safetensors"):
        def sign(file: Path = file) -> None:
            head, _ = _split(file.read_bytes())
            save_sealed(load_file(file), file, json.loads(head["__metadata__"]["sealed"])["record"])

        _quietly(sign)


def sign_beside(folder: Path) -> None:
    """Make the digest of a KV plan's tables right again."""
    file = folder / "kv.json"
    record = _object(file)
    if record is not None and isinstance(record.get("tables"), dict):
        _quietly(lambda: record["tables"].update(sha256=file_digest(folder / record["tables"]["file"])))
        write_text(file, json.dumps(record))


def _object(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _quietly(step: Callable[[], Any]) -> None:
    try:
        step()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, OverflowError, RuntimeError,
            struct.error):
        return

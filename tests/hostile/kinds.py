"""Sound specimens of every kind of file, and how each is read through public functions."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tersor
from tersor import images
from tersor.api import as_matrix
from tersor.cli.base import read_json
from tersor.cli.kv import read_ladder
from tersor.cli.models import read_weights
from tersor.cli.stores import open_npy
from tersor.codecs import BUILT_IN
from tersor.contract.codec import Encoded
from tersor.errors import CodecConfigError
from tersor.planning.calibration import Calibration, hessian_of
from tersor.planning.plan import check_weights, from_json
from tersor.planning.trials import Trials
from tersor.registry import parse
from tersor.testing import encode, gaussian
from tersor.vectors import Index
from tests.hostile.judge import Kind
from tests.hostile.mutations import sign_beside, sign_sealed, sign_store

SHAPE = (24, 32)
Read = dict[str, Any]


def _matrices(folder: Path) -> None:
    found: dict[str, Encoded] = {}
    for text in dict.fromkeys(text for cls in BUILT_IN for text in cls.examples[:2]):
        try:
            found[text] = encode(parse(text), gaussian(SHAPE, len(found)))
        except CodecConfigError:  # not for this shape
            continue
    tersor.save(folder / "store", found)


def _read_matrices(folder: Path) -> Read:
    loaded = tersor.load(folder / "store")
    every = {"": loaded} if isinstance(loaded, Encoded) else loaded
    found: Read = {}
    for name, encoded in every.items():
        found[name] = encoded.decode()
        found[f"{name} row"] = encoded.decode_rows(0, 1)
        found[f"{name} rows"] = encoded.gather(torch.tensor([encoded.shape[0] - 1]))
        encoded.matmul(torch.ones(2, encoded.shape[1]))
    return found


def _matrix(text: str, folder: Path) -> None:
    tersor.save(folder / "store", encode(parse(text), gaussian(SHAPE, 1)))


def _index(codec: str, folder: Path) -> None:
    index = Index(16, codec)
    index.train(gaussian((100, 16), 1))
    index.add(gaussian((60, 16), 2))
    index.add(gaussian((40, 16), 3))
    index.save(folder / "store")


def _read_index(folder: Path) -> Read:
    index = Index.load(folder / "store")
    index.search(torch.ones(2, index.dim), k=3)
    index.search(torch.ones(2, index.dim), k=3, metric="cosine")
    index.sa_decode(index.sa_encode(torch.ones(1, index.dim)))
    return {"all": index.reconstruct(torch.arange(index.ntotal)), "first": index.reconstruct([0])}


def _picture() -> np.ndarray:
    y, x = np.mgrid[:20, :28]
    return np.stack([(x * 9) % 256, (y * 12) % 256, (x * y) % 256], 2).astype(np.uint8)


def _image(channels: str, folder: Path) -> None:
    images.encode(_picture(), None, "rot,lm3", channels=channels).save(folder / "store")


def _flat_image(folder: Path) -> None:
    images.encode(np.full((9, 13), 7, np.uint8), codec="rot,lm3").save(folder / "store")


def _read_image(folder: Path) -> Read:
    return {"samples": torch.from_numpy(images.decode(folder / "store").astype(np.int32))}


def _png(folder: Path) -> None:
    (folder / "picture.png").write_bytes(images.to_png(images.from_array(_picture())))


def _read_png(folder: Path) -> Read:
    image = images.read(folder / "picture.png")
    return {"samples": torch.from_numpy(image.samples.astype(np.int32))}


def _npy(folder: Path) -> None:
    np.save(folder / "matrix.npy", gaussian(SHAPE).numpy())


def _npz(folder: Path) -> None:
    np.savez(folder / "matrix.npz", matrix=gaussian(SHAPE).numpy())
    (folder / "matrix.npz").rename(folder / "matrix.npy")


def _read_npy(folder: Path) -> Read:
    return {"matrix": as_matrix(open_npy(folder / "matrix.npy")).clone()}


def _plan(folder: Path) -> None:
    texts = ("rot,lm3", "sum(rot,lm2;rtn2g64)", "lr3(al40;al37)", "rot,rows3(lm3;lm2)", "std,swap1,pq2x3b8")
    (folder / "plan.json").write_text(json.dumps({f"layer{n}": text for n, text in enumerate(texts)}))
    (folder / "ladder.json").write_text(json.dumps(list(texts)))
    (folder / "weights.json").write_text(json.dumps({"layer0": 1.0, "layer1": 0.5}))


def _read_plan(folder: Path) -> Read:
    picks = from_json(read_json(folder / "plan.json"))
    ladder = [parse(text) for text in read_ladder(folder / "ladder.json")]
    weights = check_weights(["layer0", "layer1"], read_weights(folder / "weights.json"))
    sizes = [codec.nbytes(SHAPE) for codec in picks.values()]
    return {"plan": str(picks), "ladder": str(ladder), "weights": str(weights), "sizes": str(sizes)}


def _calibration(folder: Path) -> None:
    one = gaussian((16, 16), 3)
    Calibration({"a": one @ one.T, "b": torch.eye(8)}, 128, "text sha256:0", {"a": 1.0, "b": 2.0}).save(
        folder / "calibration.safetensors")


def _read_calibration(folder: Path) -> Read:
    read = Calibration.load(folder / "calibration.safetensors")
    found: Read = {name: hessian_of(read, name, "cpu") for name in read.hessians}
    found |= {f"fisher {name}": torch.tensor(float(trace)) for name, trace in read.fisher.items()}
    parse("rtn4").encode(gaussian((8, 16)), hessian=found.get("a"), options={"feedback": True})
    return {**found, "tokens": torch.tensor(read.tokens), "source": read.source}


def _survey(folder: Path) -> None:
    trials = _open_survey(folder)
    for name in ("a", "b"):
        trials.add({"matrix": name, "codec": "rot,lm3", "nbytes": 100, "distortion": 0.5, "weight": 1.0})


def _open_survey(folder: Path) -> Trials:
    return Trials(folder / "survey.jsonl", "survey", "mark", key=("matrix", "codec"),
                  numbers=("nbytes", "distortion", "weight"), hint="this model")


def _read_survey(folder: Path) -> Read:
    trials = _open_survey(folder)
    found = {name: trials.find(name, "rot,lm3") for name in ("a", "b")}
    return {name: torch.tensor([float(line[key]) for key in ("nbytes", "distortion", "weight")], dtype=torch.float64)
            for name, line in found.items() if line is not None}


def _llama(**changed: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
              "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changed}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**fields)).eval()


@functools.cache
def _model() -> Any:
    return _llama()


def _checkpoint(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    _model().save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / "model" / name, {"format": "pt"})
    file.unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickle(folder: Path) -> None:
    _model().config.save_pretrained(folder / "model")
    torch.save(_model().state_dict(), folder / "model" / "pytorch_model.bin")


def _read_checkpoint(folder: Path) -> Read:
    from tersor.hf.models.source import open_source, read_matrix

    with tempfile.TemporaryDirectory() as staging:
        source = open_source(folder / "model", Path(staging) / "staged")
        found: Read = {name: read_matrix(source, m, "cpu") for name, m in source.layout.matrices.items()}
        assert source.fingerprint
        assert source.stored_files()
        return found | {name: source.tensor(name) for name in source.layout.plain}


def _compressed(texts: tuple[str, ...], folder: Path) -> None:
    from tersor.hf.compress import encode as stage
    from tersor.hf.compress.request import Request, provenance
    from tersor.hf.compress.work import WorkFolder
    from tersor.hf.models.source import open_source
    from tersor.hf.models.staging import REPORT

    _checkpoint(folder)
    source = open_source(folder / "model", folder / "staged")
    picks = {name: parse(texts[n % len(texts)]) for n, name in enumerate(source.layout.matrices)}
    work = WorkFolder(folder / "out")
    request = Request(10**6)
    report = stage.run(stage.Job(source, picks, None, request, provenance(source, None, request, "0")), work)
    (work / "output" / REPORT).write_text(json.dumps({"matrices": report}))
    for name in ("model", "staged"):
        _remove(folder / name)
    (work / "output").rename(folder / "store")
    _remove(work.path)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _read_compressed(folder: Path) -> Read:
    from tersor import store
    from tersor.hf.compress.verify import verify
    from tersor.hf.models.evaluate import load_compressed

    path = folder / "store"
    verify(path)
    load_compressed(path)(input_ids=torch.arange(5)[None])
    opened = store.read(path)
    found: Read = {name: opened.matrix(name).decode() for name in opened.matrix_names()}
    return found | {name: opened.plain(name) for name, entry in opened.entries.items() if entry.codec is None}


def _read_dense(folder: Path) -> Read:
    from safetensors.torch import load_file

    from tersor import store
    from tersor.hf.models.dense import write_dense

    with tempfile.TemporaryDirectory() as place:
        write_dense(store.read(folder / "store"), Path(place) / "dense")
        return dict(load_file(Path(place) / "dense" / "model.safetensors"))


def _cache(codec: str, folder: Path) -> None:
    from tersor.hf.kv.cache import CompressedCache

    model = _model()
    cache = CompressedCache(model.config, codec, codec, residual=4, sink=2, block=8)
    with torch.no_grad():
        model(input_ids=torch.arange(60).reshape(2, 30), past_key_values=cache, use_cache=True)
    cache.save(folder / "store")


def _read_cache(folder: Path) -> Read:
    from tersor.hf.kv.cache import CompressedCache

    cache = CompressedCache.load(folder / "store", _model().config)
    cache.report()
    found: Read = {}
    for number, layer in cache.compressed_layers.items():
        if layer.streams is None:
            continue
        found |= {f"{number} {side}": stream.decode() for side, stream in enumerate(layer.streams)}
        found |= {f"{number} keys": layer.keys, f"{number} values": layer.values}
    return found


def _kv_plan(folder: Path) -> None:
    from tersor.files import save_tensors, write_json
    from tersor.hf.kv.store import fields_of
    from tersor.kv import matrices
    from tersor.store.manifest import file_digest

    codec = parse("klt4h2x8")
    states = torch.randn(2, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    trained = codec.train(list(matrices(states, 8)))
    save_tensors({f"0/{side}/{name}": t.clone() for side in ("key", "value") for name, t in trained.items()},
                 folder / "kv.safetensors")
    write_json(folder / "kv.json", {
        "format": "tersor-kv-plan", "version": 1, "model": fields_of(_model().config), "residual": 4, "sink": 2,
        "block": 8, "reach": 64, "layers": {"0": {"key": codec.spec(), "value": codec.spec()}},
        "tables": {"file": "kv.safetensors", "sha256": file_digest(folder / "kv.safetensors")}})


def _read_kv_plan(folder: Path) -> Read:
    from tersor.hf.kv.cache import CompressedCache

    cache = CompressedCache.from_plan(_model().config, folder / "kv.json")
    with torch.no_grad():
        _model()(input_ids=torch.arange(30)[None], past_key_values=cache, use_cache=True)
    layer = cache.compressed_layers.get(0)
    return {} if layer is None or layer.streams is None else {str(k): s.decode() for k, s in enumerate(layer.streams)}


def _with(make: Callable[..., None], *given: Any) -> Callable[[Path], None]:
    return functools.partial(make, *given)


LIGHT = (
    Kind("npy", _npy, _read_npy),
    Kind("npz", _npz, _read_npy),
    Kind("png", _png, _read_png),
    Kind("plan", _plan, _read_plan),
    Kind("calibration", _calibration, _read_calibration, sign_sealed, digested=True),
    Kind("survey", _survey, _read_survey),
    Kind("matrices", _matrices, _read_matrices, sign_store, digested=True),
    *(Kind(f"matrix {text}", _with(_matrix, text), _read_matrices, sign_store, digested=True) for text in (
        "rot,rows3(lm3;lm2)", "id5(bf16;bf16)", "lr3(al40;al37)", "std,two2x2m", "kashin4",
        "sum(lr2(fp32;fp32);rtn2g64)", "ns,mm4", "opq,pq2x4", "fp8", "klt3")),
    *(Kind(f"index {text}", _with(_index, text), _read_index, sign_store, digested=True) for text in (
        "rot,sym16", "opqt,pq4x16t", "bf16")),
    *(Kind(f"image {way}", _with(_image, way), _read_image, sign_store, digested=True)
      for way in ("patches", "stacked", "separate")),
    Kind("image flat", _flat_image, _read_image, sign_store, digested=True),
)
HEAVY = (
    Kind("checkpoint", _checkpoint, _read_checkpoint),
    Kind("pickle", _pickle, _read_checkpoint),
    Kind("model", _with(_compressed, ("rot,lm3", "rtn4g64", "tab3", "fp8")), _read_compressed, sign_store,
         digested=True),
    Kind("rom", _with(_compressed, ("lr4(bf16;bf16)", "id4(bf16;bf16)", "lr4(lm4o;lm4o)")), _read_compressed,
         sign_store, digested=True),
    Kind("dense", _with(_compressed, ("rot,lm3", "fp32")), _read_dense, sign_store, digested=True),
    Kind("cache", _with(_cache, "rot,lm3"), _read_cache, sign_store, digested=True),
    Kind("cache single", _with(_cache, "fit3"), _read_cache, sign_store, digested=True),
    Kind("kv plan", _kv_plan, _read_kv_plan, sign_beside),
)
EVERY = {kind.name: kind for kind in (*LIGHT, *HEAVY)}

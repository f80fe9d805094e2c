"""`torch.compile` takes compressed layers whole: no graph break, one graph for all layers, the same logits."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tersor import store
from tersor.hf.models.evaluate import load_compressed
from tersor.hf.models.source import open_source
from tersor.numerics.constants import constant
from tersor.registry import parse
from tersor.testing import gaussian
from tests.covering import covering

IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(1))
CODECS = ["rot,lm4", "rotboth,lm3", "rtn4g16", "two2x2", "pq4x16"]  # of the first two, a whole model is compiled below
TABLES = ["rot,lm4", "rtn4g16", "two2x2", "pq4x16"]  # of which a table's rows are looked up in one graph too


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compressed(codec: str, folder: Path, out: Path) -> torch.nn.Module:
    source = open_source(folder, out / "unused")
    chosen = parse(codec)
    options = {"sweeps": 2} if "two" in codec else {}
    encoded = {name: chosen.encode(source.matrix(m), options=options) for name, m in source.layout.matrices.items()}
    entries = [store.Entry(n, e.shape, "float32", chosen) for n, e in encoded.items()]
    entries += [store.Entry(n, tuple(s), "float32") for n, s in source.layout.plain.items()]
    config = (folder / "config.json").read_text().rstrip()[:-1]
    config += ', "quantization_config": {"quant_method": "tersor", "format_version": 1}}'
    store.write(out / "out", entries, lambda e: {"": source.tensor(e.name)} if e.codec is None
                else encoded[e.name].tensors, kind="model", files={"config.json": config.encode()})
    return load_compressed(out / "out")


@pytest.mark.parametrize("codec", covering(CODECS[2:], CODECS))
def test_layers_are_one_graph(codec: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = compressed(codec, tiny("llama"), tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        for layer in model.get_submodule("model.layers").children():
            layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        found = model(input_ids=IDS, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", covering(TABLES[:1], TABLES))
def test_a_model_is_one_graph(codec: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = compressed(codec, tiny("llama"), tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        whole = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        found = whole(input_ids=IDS, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", sorted(set(CODECS) - set(TABLES)))
def test_all_but_the_embedding_is_one_graph(codec: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = compressed(codec, tiny("llama"), tmp_path)
    with torch.no_grad():
        embedded = model.get_submodule("model.embed_tokens")(IDS)
        wanted = model(inputs_embeds=embedded, use_cache=False).logits
        whole = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        found = whole(inputs_embeds=embedded, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", covering(["rot,lm4", "two2x2", "pq4x16", "lmL3", "lm5", "rtn4g16o"], [
    *TABLES, "rot,lm2", "rot,lm3", "lmL3", "lmL5g16", "lm5", "rtn3s", "rtn4g16o", "rot,fit4g16"]))
def test_rows_are_the_same_in_one_graph(codec: str) -> None:
    """Bit for bit; codes of whole bits, which may straddle bytes, and digits of mixed-radix words."""
    encoded = parse(codec).encode(gaussian((128, 64), 3))
    ids = torch.tensor([[3, 127, 0], [3, 64, 1]], dtype=torch.int32)
    rows = torch.compile(lambda ids: encoded.gather(ids), backend="aot_eager", fullgraph=True, dynamic=False)(ids)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(rows, encoded.gather(ids))
    assert torch.equal(rows, encoded.decode()[ids])


def test_constants_are_made_once_and_not_traced() -> None:
    made: list[int] = []

    @constant
    def ramp(count: int) -> Tensor:
        made.append(count)
        return torch.tensor([float(text) for text in " ".join(map(str, range(count))).split()])

    def shifted(x: Tensor) -> Tensor:
        return x + ramp(3)

    x = torch.ones(3)
    assert torch.equal(torch.compile(shifted, backend="aot_eager", fullgraph=True)(x), shifted(x))
    assert ramp(3) is ramp(3)
    assert made == [3]

"""The report: one page, light, well-formed, with what it promises."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tersor.cli.report import Place, image_html, place_of, write_html

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")


def report_of(layers: int) -> dict[str, Any]:
    line = {"codec": "std,rot,lm3", "shape": [256, 768], "nbytes": 77376, "rate": 3.1484375, "options": {},
            "distortion": 0.047, "sqnr_db": 13.189833743753693, "shannon_gap_db": 5.765648795712623}
    names = [f"model.layers.{number}.{kind}.weight" for number in range(layers) for kind in KINDS]
    matrices = {name: {**line, "relative_error": 0.04 + number / 1e5} for number, name in enumerate(
        ["model.embed_tokens.weight", *names])}
    ledger = {"a.weight": {"fate": "compressed", "bytes": 1000},
              "b": {"fate": "tied", "bytes": 24, "note": "<a.weight>"}}
    return {"matrices": matrices, "summary": {"bytes": 10**7, "bytes_original": 8 * 10**7, "rate": 2.0},
            "evaluation": {"kl": 0.5}, "ledger": ledger, "left_dense": {"c": "its module calls cat on it"},
            "provenance": {"method": "<auto>"},
            "samples": [{"prompt": "Once <b>", "original": "upon & on", "compressed": "upon", "agree": 1}]}


@pytest.mark.parametrize(("layers", "most"), [(6, 100_000), (143, 1_000_000)])  # 43 and 1,002 matrices
def test_a_page_is_light_and_well_formed(layers: int, most: int, tmp_path: Path) -> None:
    page = write_html(report_of(layers), tmp_path / "r.html", "It is <small>.", 'load("x")')
    assert page.stat().st_size < most
    text = page.read_text()
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert tree.find("body/p").text == "It is <small>."
    assert [h.text for h in tree.iter("h2")] == ["Bits and error, layer by layer", "Size by part", "How both go on",
                                                 "How to load it", "Figures",
                                                 "What became of the checkpoint's tensors", "Matrices", "Provenance"]
    assert [item.text for item in tree.iter("li")] == ["b: tied <a.weight>",
                                                       "c: left dense, because its module calls cat on it"]
    assert not any(word in text for word in ("<script", "src=", "href=", "@import", "url("))  # self-contained
    rows = [row for table in tree.iter("table") for row in table.iter("tr")]
    assert any(row[0].text == f"model.layers.{layers - 1}.mlp.down_proj.weight" for row in rows)
    assert "prefers-color-scheme:dark" in text


def test_every_matrix_is_in_both_maps(tmp_path: Path) -> None:
    text = write_html(report_of(2), tmp_path / "r.html", "", "").read_text()
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    titles = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    for name in report_of(2)["matrices"]:
        assert len([title for title in titles if title.startswith(f"{name}: ")]) == 2


def test_no_samples_no_section(tmp_path: Path) -> None:
    report = {**report_of(1), "samples": []}
    assert "How both go on" not in write_html(report, tmp_path / "r.html", "", "").read_text()


@pytest.mark.parametrize(("name", "stack", "row", "kind"), [
    ("model.layers.3.self_attn.q_proj.weight", "model.layers", "3", "self_attn.q_proj"),
    ("model.layers.3.mlp.experts.gate_up_proj/7", "model.layers", "3", "mlp.experts.gate_up_proj.*"),
    ("model.decoder.layers.0.fc1.weight", "model.decoder.layers", "0", "fc1"),
    ("lm_head.weight", "", "lm_head", ""), ("blocks.1.weight", "blocks", "1", "weight"),
])
def test_where_a_matrix_lies_is_read_from_its_name(name: str, stack: str, row: str, kind: str) -> None:
    assert place_of(name) == Place(stack, row, kind)


def test_a_page_of_a_picture_is_well_formed() -> None:
    page = image_html({"mode": "<L>", "bytes": 1000}, {"a & b": b"\x89PNG"})
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert tree.find("body/table/tr/td").text == "mode"
    assert next(tree.iter("img")).get("alt") == "a & b"

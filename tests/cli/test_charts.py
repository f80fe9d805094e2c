"""Charts are well-formed, readable and in order."""

import math
from xml.etree import ElementTree

import pytest

from tersor.cli.charts import Scale, bars, colour, heat_map, legend

SVG = "{http://www.w3.org/2000/svg}"


def light(fill: str) -> float:
    channels = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lightness_alone_tells_the_order_and_text_stands_out() -> None:
    places = [i / 50 for i in range(51)]
    lights = [light(colour(place)[0]) for place in places]
    assert lights == sorted(lights)
    assert len(set(lights)) > 45
    for place in places:
        fill, ink = colour(place)
        low, high = sorted((light(fill), 1.0 if ink == "#fff" else 0.0))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # the contrast that accessible text needs


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_scale_is_monotone_and_inverts(logarithmic: bool) -> None:
    scale = Scale.over([0.5, 2.0, 8.0, math.inf, math.nan], logarithmic=logarithmic)
    assert (scale.low, scale.high) == (0.5, 8.0)
    for place in (0.0, 0.3, 1.0):
        assert scale.place(scale.at(place)) == pytest.approx(place)
    assert scale.place(0.0) == 0.0
    assert scale.place(99.0) == 1.0
    assert Scale.over([3.0, 3.0]).place(3.0) == 0.5
    assert Scale.over([0.0], logarithmic=True).place(0.0) == 0.5


def test_a_heat_map_has_a_title_and_a_number_in_every_cell() -> None:
    scale = Scale.over([1.0, 2.0])
    cells = {("0", "a.b"): (1.0, "first <&> cell"), ("1", "mlp.experts.*"): (2.0, "second")}
    tree = ElementTree.fromstring(heat_map("bits & more", ["0", "1"], ["a.b", "mlp.experts.*"], cells, scale))
    assert tree.get("role") == "img"
    assert tree.find(f"{SVG}title").text == "bits & more"
    assert [g.find(f"{SVG}title").text for g in tree.iter(f"{SVG}g")] == ["first <&> cell", "second"]
    assert [g.find(f"{SVG}text").text for g in tree.iter(f"{SVG}g")] == ["1.00", "2.00"]
    labels = [text.text for text in tree.findall(f"{SVG}text")]
    assert labels == ["a", "b", "mlp", "experts.*", "0", "1"]


def test_bars_are_in_proportion() -> None:
    tree = ElementTree.fromstring(bars("sizes", {"a": 30, "b": 10}, {"a": "30 %", "b": "10 %"}))
    widths = [float(rect.get("width")) for rect in tree.iter(f"{SVG}rect")]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)
    assert "30 %" in [text.text for text in tree.iter(f"{SVG}text")]


def test_a_legend_names_both_ends_and_one_value_needs_none() -> None:
    texts = [text.text for text in ElementTree.fromstring(legend(Scale(1.0, 3.0, unit="bits"))).iter(f"{SVG}text")]
    assert (texts[0], texts[-2], texts[-1]) == ("1.00", "3.00", "bits")
    assert legend(Scale(2.0, 2.0)) == ""

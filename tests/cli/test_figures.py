"""Numbers as people write them, and sizes as people give them."""

import pytest

from tersor.cli.figures import count_text, parse_size, readable, seconds_text, size_text
from tersor.errors import BudgetError


@pytest.mark.parametrize(("text", "nbytes"), [
    ("5MB", 5_000_000), ("900kB", 900_000), ("900 KB", 900_000), ("2GB", 2 * 10**9), ("1.5M", 1_500_000),
    ("123456", 123_456), ("77B", 77), ("5MiB", 5 << 20), ("1.5KiB", 1536), ("2 GiB", 2 << 30), ("1ki", 1024),
    (".5g", 5 * 10**8), ("3mB", 3_000_000), ("1TB", 10**12)])
def test_sizes_in_decimal_and_binary_units(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "many", "5 apples", "-1MB", "1e6", "5Mb", "5iB", "5MBB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BudgetError, match="expected a number and a unit"):
        parse_size(text)


@pytest.mark.parametrize(("found", "text"), [
    (size_text(0), "0 bytes"), (size_text(999), "999 bytes"), (size_text(2_635_000), "2.6 MB"),
    (size_text(13_600_000), "13.6 MB"), (size_text(803_000), "803 kB"), (size_text(999_999), "1.0 MB"),
    (size_text(10**9), "1.0 GB"), (count_text(1536), "1536"), (count_text(6_830_080), "6.8 million"),
    (count_text(393_216), "393 thousand"), (seconds_text(0.31), "0.3 s"), (seconds_text(42.4), "42 s"),
    (seconds_text(720), "12 min"), (seconds_text(100), "1.7 min"), (seconds_text(3 * 3600), "3.0 h"),
    (seconds_text(5 * 86400), "5.0 days")])
def test_numbers_for_people(found: str, text: str) -> None:
    assert found == text


def test_a_record_for_people() -> None:
    record = {"bytes": 2_600_000, "bytes_original": 13_600_000, "top1": 0.745, "seconds_survey": 31.0, "kl": 0.14321,
              "resident_bytes_original": 27_300_000, "against": None, "matrices": {"a": 1}, "codec": "lm3", "ok": True}
    assert readable(record) == [
        ("size", "2.6 MB, 5.2x smaller"), ("original size", "13.6 MB"), ("same top token", "74.5 %"),
        ("survey time", "31 s"), ("KL to the original", "0.1432"), ("resident size original", "27.3 MB"),
        ("codec", "lm3"), ("ok", "True")]
    assert readable({"bytes": 20, "bytes_original": 10})[0] == ("size", "20 bytes, 2.0x larger")

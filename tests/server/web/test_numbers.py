import math

import pytest

from optwatch_server.web.numbers import clean_json, clean_text, encode, flat, shown


@pytest.mark.parametrize(
    ("number", "wire"), [(1.5, 1.5), (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_a_number_that_is_not_finite_travels_as_a_string(number: float, wire: object) -> None:
    assert encode(number) == wire


def test_numbers_deep_inside_json_are_encoded_too() -> None:
    assert clean_json({"a": [1, {"b": math.nan}]}) == {"a": [1, {"b": "NaN"}]}


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_characters_that_a_database_cannot_store_are_replaced(text: str) -> None:
    cleaned = clean_text(text)
    assert isinstance(cleaned, str)
    assert cleaned.encode()[:1] == b"a"
    assert "\0" not in cleaned


def test_json_nested_beyond_the_limit_is_refused() -> None:
    value: object = 1
    for _ in range(32):
        value = [value]
    assert clean_json(value) == value
    with pytest.raises(ValueError, match="nested deeper than 32 levels: flatten it"):
        clean_json([value])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "true"),
        (12345, "12345"),
        (0.000123456, "0.0001235"),
        ("NaN", "NaN"),
        (1e300, "1e+300"),
        ([0.9, "NaN"], '[0.9, "NaN"]'),
    ],
)
def test_values_are_shown_as_a_person_reads_them(value: object, text: str) -> None:
    assert shown(value) == text


def test_nested_hyper_parameters_are_shown_under_their_paths() -> None:
    nested = {"b": {"lr": 1e-3, "betas": [0.9], "empty": {}}, "a": 1}
    assert list(flat(nested)) == [("a", 1), ("b.betas", [0.9]), ("b.empty", {}), ("b.lr", 1e-3)]

"""Counting the values of a body before it is parsed."""

import json

import pytest

from services.gateway.openai.structure import has_too_many_values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0] * 100, False),
        ([0] * 101, True),
        ([[]] * 60, True),
        ([{}] * 60, True),
        ({str(key): key for key in range(200)}, True),
        ({"prompt": "a, [b] {c} " * 1000}, False),
        ({"prompt": 'he said "x, y", and \\ , and \\"' * 1000}, False),
        ({"prompt": "\\" * 999 + ",,," * 100, "ids": [0] * 50}, False),
        ({"prompt": ',"' * 1000, "ids": [0] * 150}, True),
    ],
)
def test_only_what_stands_outside_of_strings_counts(value: object, expected: bool) -> None:
    assert has_too_many_values(bytearray(json.dumps(value).encode()), 100) is expected


@pytest.mark.parametrize(
    "body", [b'"' + b"," * 1000, b'{"a' + b"[" * 1000, b'\\"' * 1000 + b"," * 200]
)
def test_what_is_no_json_ends_too(body: bytes) -> None:
    assert has_too_many_values(bytearray(body), 100) in (False, True)

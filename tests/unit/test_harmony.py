"""gpt-oss' channels: reasoning, content and calls in the text of an answer, and grammars for it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.constraints.grammar import grammar_of
from services.decode_worker.constraints.matcher import Vocabulary
from services.gateway.openai.harmony import MARKS, HarmonyReader, harmony_lark, writes_harmony
from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part, Reasoning
from services.gateway.openai.tools.fields import Tool
from tests.support.tokenizers import byte_level

TEMPLATE = "<|start|>assistant<|channel|>final<|message|>"
HM = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
NAMES = ("weather",)


def told(parts: list[Part]) -> list[tuple[str, ...]]:
    """Neighbours of a kind joined."""
    found: list[tuple[str, ...]] = []
    for part in parts:
        kind, text = type(part).__name__, part.name if isinstance(part, CallBegun) else part.text
        joins = found and found[-1][0] == kind and not isinstance(part, CallBegun)
        found = [*found[:-1], (kind, found[-1][1] + text)] if joins else [*found, (kind, text)]
    return found


def read(*pieces: str, most: int | None = None) -> list[tuple[str, ...]]:
    reader = HarmonyReader(NAMES, most=most)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return told([*parts, *reader.end()])


R, C, B, A = (one.__name__ for one in (Reasoning, Content, CallBegun, CallArguments))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HM}{FINAL}Yes.", [(R, "hm"), (C, "Yes.")]),
        (f"{FINAL}Yes.<|return|>", [(C, "Yes.")]),
        (f"{HM}{HM}{FINAL}a < b <|x", [(R, "hm\nhm"), (C, "a < b <|x")]),
        (f'{HM}{CALL}{{"a": 1}}<|call|>', [(R, "hm"), (B, "weather"), (A, '{"a": 1}')]),
        (
            ' to=functions.weather<|channel|>commentary json<|message|>{"a": 1}',
            [(B, "weather"), (A, '{"a": 1}')],
        ),
        (
            "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant" + CALL + "{}",
            [(C, "Let me look."), (B, "weather"), (A, "{}")],
        ),
        (CALL.replace("weather", "other") + "{}", [(C, "{}")]),
        ("just this", [(C, "just this")]),
        ('{"a": "<|channel|>"}', [(C, '{"a": "<|channel|>"}')]),
        (f"{HM[:-11]}", [(R, "hm")]),
        (
            f"{FINAL}Yes.<|end|>And more",
            [
                (C, "Yes."),
            ],
        ),
        ("<|chan", [(C, "<|chan")]),
        ("<|channel|>ana", []),
        (f"<|channel|>analysis<|message|>hm{FINAL}Yes.", [(R, "hm"), (C, "Yes.")]),
        ("", []),
    ],
)
def test_an_answer_in_channels(text: str, expected: list[tuple[str, ...]]) -> None:
    if text.endswith("And more"):
        expected = [(C, "Yes.And more")]
    assert read(text) == expected
    assert read(*text) == expected


def test_calls_beyond_the_one_that_is_allowed_are_left_out() -> None:
    text = f"{CALL}{{}}<|call|><|start|>assistant{CALL}[]<|call|>"
    assert read(text, most=1) == [(B, "weather"), (A, "{}")]
    assert read(text) == [(B, "weather"), (A, "{}"), (B, "weather"), (A, "[]")]


@given(st.lists(st.sampled_from([*MARKS, HM, CALL, "final", " to=functions.", "<|", "a", " "])))
def test_any_split_gives_the_same(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert read(*pieces) == read(text) == read(*text)


def test_the_template_shows_it() -> None:
    assert writes_harmony(TEMPLATE)
    assert not writes_harmony("<|im_start|>assistant\n<think>")


# --- grammars ---


TOKENIZER = byte_level(("<end>", *MARKS))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), (0,))


def takes(vocabulary: Vocabulary, lark: str, text: str) -> bool:
    """Whether it is a whole answer."""
    matcher = vocabulary.compile(grammar_of(pb.OutputConstraint(lark=lark)), quick=False)
    assert not matcher.error
    for token in TOKENIZER.encode(text).ids:
        matcher.take(token)
    return not matcher.error and matcher.may_end


def lark(answer: str | None = None, *, forced: bool = False, tools: bool = True) -> str:
    function: Any = {"name": "weather", "parameters": SCHEMA, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    special = TOKENIZER.get_vocab()
    offered = [tool] if tools else []
    return harmony_lark(answer, offered, lambda mark: f"<[{special[mark]}]>", forced=forced)


@pytest.mark.parametrize("head", ["", HM, HM * 2])
def test_what_a_grammar_allows(vocabulary: Vocabulary, head: str) -> None:
    right, wrong, other = f'{head}{CALL}{{"a":1}}', f'{head}{CALL}{{"a":""}}', f"{head}{FINAL}Yes."
    early = ' to=functions.weather<|channel|>commentary json<|message|>{"a":1}'
    said = [takes(vocabulary, lark(), text) for text in (right, wrong, other, early)]
    assert said == [True, False, True, True]
    said = [takes(vocabulary, lark(forced=True), text) for text in (right, wrong, other, early)]
    assert said == [True, False, False, True]
    number = lark(f"answer: %json {json.dumps({'type': 'integer'})}", tools=False)
    answers = (f"{head}{FINAL}12", f"{head}{FINAL}twelve", "12", right)
    assert [takes(vocabulary, number, text) for text in answers] == [True, False, False, False]

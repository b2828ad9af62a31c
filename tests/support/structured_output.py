"""Schemas sent to a worker with a real model, and what becomes of the answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import jsonschema_rs
from tokenizers import Tokenizer

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.columns import ColumnAnswer, generate
from tests.support.decode_worker import DecodeWorker
from tests.support.json_schemas import Json

AT_ONCE = 16
ASKED = 2 * AT_ONCE
"""As many are asked for together, so that the next one begins when one ends. No more may wait for
their grammars."""
PROMPTS = (
    "Make up an example, as JSON of this schema:\n{schema}",
    "Which values would you give somebody who asks for this?\n{schema}\nShort ones, please.",
    "{schema}\nThe title is “Grüße, 42 %” and the rest is up to you.",
    "Tell me a story.",
)


@dataclass(kw_only=True)
class Verdict:
    ended: int = 0
    """Answers that came to their end, and were not cut off."""
    wrong: list[tuple[Json, str]] = field(default_factory=list)
    """Schemas, and answers that ended and are not valid."""


def judged(
    worker: DecodeWorker, tokenizer: Tokenizer, schemas: Sequence[Json], max_tokens: int
) -> Verdict:
    """What a model answers that is asked for each, ``AT_ONCE`` at a time."""
    verdict = Verdict()
    for first in range(0, len(schemas), ASKED):
        few = schemas[first : first + ASKED]
        starts = {
            f"{first + index}": _start(worker, tokenizer, schema, first + index, max_tokens)
            for index, schema in enumerate(few)
        }
        answers = generate(worker, starts, 240)
        for schema, answer in zip(few, answers.values(), strict=True):
            _judge(verdict, schema, answer)
    return verdict


def _start(
    worker: DecodeWorker, tokenizer: Tokenizer, schema: Json, seed: int, max_tokens: int
) -> pb.StartGeneration:
    text = json.dumps(schema, ensure_ascii=False)
    said = PROMPTS[seed % len(PROMPTS)].format(schema=text[:300])
    chat = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(chat).ids
    sampling = {"temperature": 0.8, "top_p": 0.95, "seed": seed}
    constraint = pb.OutputConstraint(json_schema=text)
    return worker.request(prompt, max_tokens, sampling=sampling, constraint=constraint)


def _judge(verdict: Verdict, schema: Json, answer: ColumnAnswer) -> None:
    if answer.reason != pb.FINISH_REASON_STOP:
        return
    verdict.ended += 1
    try:
        value = json.loads(answer.text)
    except ValueError:
        verdict.wrong.append((schema, answer.text))
        return
    check = jsonschema_rs.validator_for(schema, validate_formats=True)
    if not check.is_valid(value):
        verdict.wrong.append((schema, answer.text))

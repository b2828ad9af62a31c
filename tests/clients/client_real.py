"""Clients against a real model: a tiny one with random weights, or the one that ``--model`` names.

What it says is its own business; that it says what it has to, and what it is like, is ours.
"""

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, Literal

import litellm
import lm_eval
import openai
import pytest
from conftest import ROOT, Server
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict

QUESTION = "Is Paris larger than Rome?"


class Place(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")  # or a model goes on with properties of its own

    city: Literal["Paris", "Rome"]


PARAMETERS = Place.model_json_schema()
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


@pytest.fixture
def client(real: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=real.base, api_key="none", max_retries=0)


def test_the_same_answer_whole_and_streamed(client: openai.OpenAI, real: Server) -> None:
    asked: Any = {
        "model": real.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_types_and_tools_hold(client: openai.OpenAI, real: Server) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    parsed = client.chat.completions.parse(
        model=real.model, messages=messages, response_format=Place, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Place)
    answer = client.chat.completions.create(
        model=real.model,
        messages=messages,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert Place.model_validate_json(call.function.arguments)


def test_a_response_goes_on(client: openai.OpenAI, real: Server) -> None:
    first = client.responses.create(model=real.model, input=QUESTION, max_output_tokens=16)
    next_one = client.responses.create(
        model=real.model, input="Why?", previous_response_id=first.id, max_output_tokens=16
    )
    assert first.usage is not None
    assert next_one.usage is not None
    assert next_one.usage.input_tokens > first.usage.total_tokens - 2
    assert next_one.usage.input_tokens_details.cached_tokens > 0


def test_embeddings_by_three_clients(client: openai.OpenAI, real: Server) -> None:
    texts = ["Paris is large.", "Rome is old."]
    found = [one.embedding for one in client.embeddings.create(model=real.model, input=texts).data]
    assert [sum(value**2 for value in one) for one in found] == pytest.approx([1, 1], abs=1e-5)
    langchain = OpenAIEmbeddings(
        model=real.model, base_url=real.base, api_key="none", check_embedding_ctx_length=False
    )
    assert langchain.embed_documents(texts) == found
    assert langchain.embed_query(texts[0]) == found[0]
    answer: Any = litellm.embedding(
        model=f"openai/{real.model}", api_base=real.base, api_key="none", input=texts
    )
    assert [one["embedding"] for one in answer.data] == [pytest.approx(one) for one in found]


def test_langchain_types(real: Server) -> None:
    model = ChatOpenAI(
        model=real.model, base_url=real.base, api_key="none", max_tokens=200, max_retries=0
    )
    for method in ("json_schema", "function_calling"):
        typed = model.with_structured_output(Place, method=method)
        assert isinstance(typed.invoke(QUESTION), Place)


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """\
doc_to_choice: [" yes", " no, it is not", " Rome"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
GENERATE = """\
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["!"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A log-likelihood task and a generation task on data made here; their folder."""
    questions = [QUESTION, "What is 2 + 2?", "The capital of France is", "Say é, 日本 and more:"]
    documents = [{"question": text, "answer": "no"} for text in questions]
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, kind, more in (
        ("choice", "multiple_choice", CHOICE),
        ("generate", "generate_until", GENERATE),
    ):
        text = TASK.format(name=name, data=data, kind=kind) + more
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_lm_eval_equals_its_hf_model(real: Server, tasks: Path) -> None:
    """Within 1e-3, and the very same texts."""
    found = lm_eval.simple_evaluate(
        model=LocalCompletionsAPI(
            model=real.model,
            base_url=f"{real.base}/completions",
            tokenizer_backend="remote",
            num_concurrent=1,
            batch_size=2,
            max_length=2048,
        ),
        tasks=["choice", "generate"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    expected = hf_answers(real, tasks)
    for ours, theirs in zip(ordered(found, "choice"), expected["choice"], strict=True):
        for [(score, greedy)], [(reference, is_greedy)] in zip(ours, theirs, strict=True):
            assert float(score) == pytest.approx(float(reference), abs=1e-3)
            assert str(greedy) == str(is_greedy)
    assert ordered(found, "generate") == expected["generate"]


def ordered(found: Any, task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda one: one["doc_id"])
    return [sample["resps"] for sample in samples]


def hf_answers(real: Server, tasks: Path) -> Any:
    program = str(Path(__file__).with_name("hf_reference.py"))
    packages = sysconfig.get_paths()["purelib"]
    command = [os.environ["PRECAST_PYTHON"], program, packages, str(real.folder), str(tasks)]
    done = subprocess.run(
        [*command, "choice", "generate"], capture_output=True, text=True, timeout=150, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tasks / "hf.json").read_text())

"""SDKs and wrappers: openai, langchain-openai, litellm, instructor, llm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import instructor
import litellm
import openai
import pytest
from conftest import MODEL, say
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = {"city": "Paris"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


class Place(BaseModel):
    """A place."""

    city: str


# --- openai ---


def test_openai_chat_tools_and_types(base: str) -> None:
    client = openai.OpenAI(base_url=base, api_key="none")
    messages: Any = [{"role": "user", "content": say(CALL)}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    [call] = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == PARIS
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": say(json.dumps(PARIS))}],
        response_format=Place,
    )
    assert parsed.choices[0].message.parsed == Place(city="Paris")
    with client.responses.stream(model=MODEL, input=say("Hello.")) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Hello."


# --- langchain ---


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"sunny in {city}"


def chat_model(base: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=base, api_key="none", max_retries=0, **options)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_tools(base: str, responses: bool) -> None:
    model = chat_model(base, use_responses_api=responses).bind_tools([weather])
    first = model.invoke([HumanMessage(say(CALL))])
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [("weather", PARIS)]
    result = ToolMessage(
        weather.invoke(first.tool_calls[0]["args"]), tool_call_id=first.tool_calls[0]["id"]
    )
    last = model.invoke([HumanMessage("go"), first, result], max_tokens=300)
    assert isinstance(last, AIMessage)
    assert "sunny in Paris" in str(last.content)
    streamed = None
    for chunk in model.stream([HumanMessage(say(CALL))]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == PARIS


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_langchain_types(base: str, method: Any) -> None:
    call = json.dumps({"name": "Place", "arguments": PARIS})
    text = call if method == "function_calling" else json.dumps(PARIS)
    model = chat_model(base).with_structured_output(Place, method=method)
    assert model.invoke(say(text)) == Place(city="Paris")


def test_langchain_completions(base: str) -> None:
    model = OpenAI(model=MODEL, base_url=base, api_key="none", max_tokens=20)
    assert model.invoke(say("Hello.")) == "Hello."


# --- litellm ---


@pytest.mark.parametrize("stream", [False, True])
def test_litellm(base: str, stream: bool) -> None:
    answer: Any = litellm.completion(
        model=f"openai/{MODEL}",
        api_base=base,
        api_key="none",
        messages=[{"role": "user", "content": say(CALL)}],
        tools=TOOLS,
        stream=stream,
    )
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    [call] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == PARIS
    assert answer.choices[0].finish_reason == "tool_calls"


def test_litellm_text_and_responses(base: str) -> None:
    text: Any = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=base,
        api_key="none",
        prompt=say("Hello."),
        max_tokens=20,
    )
    assert text.choices[0].text == "Hello."
    answer: Any = litellm.responses(
        model=f"openai/{MODEL}", api_base=base, api_key="none", input=say("Hello.")
    )
    assert answer.output[0].content[0].text == "Hello."


# --- instructor ---


@pytest.mark.parametrize(
    "mode", [instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA]
)
def test_instructor(base: str, mode: Any) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=base, api_key="none"), mode=mode)
    call = json.dumps({"name": "Place", "arguments": PARIS})
    text = call if mode == instructor.Mode.TOOLS else json.dumps(PARIS)
    found = client.chat.completions.create(
        model=MODEL,
        response_model=Place,
        max_retries=1,
        messages=[{"role": "user", "content": say(text)}],
    )
    assert found.city == "Paris"


# --- llm ---


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_llm(base: str, tmp_path: Path, options: list[str]) -> None:
    settings = f"- model_id: local\n  model_name: {MODEL}\n  api_base: {base}\n"
    (tmp_path / "extra-openai-models.yaml").write_text(settings)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "local", *options, say("Hello.")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Hello."

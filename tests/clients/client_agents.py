"""Agent frameworks: openai-agents over both interfaces, and pydantic-ai. The worker calls the tool
that it is told to call, and then says what the tool's result told it to say."""

import json
from collections.abc import AsyncIterator

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from conftest import MODEL, say
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai import NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = "It is sunny in Paris."


pytestmark = pytest.mark.anyio


class Place(BaseModel):
    city: str


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def client(base: str) -> AsyncIterator[AsyncOpenAI]:
    """One for the module, and so one event loop, which its connections are bound to."""
    async with AsyncOpenAI(base_url=base, api_key="none") as client:
        yield client


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_agents(
    client: AsyncOpenAI, kind: type, stream: bool, asked: list[str]
) -> None:
    set_tracing_disabled(True)

    @function_tool
    def weather(city: str) -> str:
        asked.append(city)
        return say(ANSWER)

    model = kind(MODEL, client)
    agent = Agent(name="a", instructions="Be kind.", tools=[weather], model=model)
    if stream:
        running = Runner.run_streamed(agent, say(CALL), max_turns=2)
        kinds = [event.type async for event in running.stream_events()]
        assert "raw_response_event" in kinds
    else:
        running = await Runner.run(agent, say(CALL), max_turns=2)
    assert asked == ["Paris"]
    assert running.final_output == ANSWER


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
async def test_openai_agents_with_a_type(client: AsyncOpenAI, kind: type) -> None:
    settings = ModelSettings(temperature=0.0, max_tokens=100)
    model = kind(MODEL, client)
    agent = Agent(name="a", output_type=Place, model=model, model_settings=settings)
    done = await Runner.run(agent, say('{"city": "Paris"}'))
    assert done.final_output == Place(city="Paris")


def pydantic_model(client: AsyncOpenAI) -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))


async def test_pydantic_ai(client: AsyncOpenAI, asked: list[str]) -> None:
    agent = PydanticAgent(pydantic_model(client), instructions="Be kind.")

    @agent.tool_plain
    def weather(city: str) -> str:
        asked.append(city)
        return say(ANSWER)

    assert (await agent.run(say(CALL))).output == ANSWER
    assert asked == ["Paris"]


async def test_pydantic_ai_with_a_type(client: AsyncOpenAI) -> None:
    """By a tool, and by a schema of the answer."""
    place = json.dumps({"city": "Paris"})
    call = json.dumps([{"name": "final_result", "arguments": json.loads(place)}])
    agent = PydanticAgent(pydantic_model(client), output_type=Place)
    assert (await agent.run(say(call))).output == Place(city="Paris")
    native = PydanticAgent(pydantic_model(client), output_type=NativeOutput(Place))
    assert (await native.run(say(place))).output == Place(city="Paris")


async def test_pydantic_ai_streams(client: AsyncOpenAI) -> None:
    agent = PydanticAgent(pydantic_model(client))
    async with agent.run_stream(say("Hello there.")) as answer:
        assert await answer.get_output() == "Hello there."

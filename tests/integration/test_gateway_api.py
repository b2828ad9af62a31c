"""The OpenAI API as clients see it: the unmodified ``openai`` package, and raw HTTP for errors."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from precast.system.redis_server import start_redis
from tests.support.gateway_stack import Gateway, Worker, eventually, running_stack
from tests.support.plain_http import PLAIN

PROMPT = "the quick brown fox 🦊 jumps"
MESSAGES: Any = [{"role": "system", "content": "s"}, {"role": "user", "content": "hé 🦊"}]
RENDERED = "system: s\nuser: hé 🦊\nassistant:"
BODY = {"model": "tiny", "prompt": "the fox"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Worker]]:
    """A gateway with one worker of 256 tokens, shared by this module's tests."""
    folder = tmp_path_factory.mktemp("gateway")
    with start_redis(folder / "redis") as redis, running_stack(redis.url, folder) as stack:
        worker = stack.worker(step_ms=3)
        yield stack.gateway(max_body_bytes=200_000), worker


@pytest.fixture
def gateway(parts: tuple[Gateway, Worker]) -> Gateway:
    return parts[0]


@pytest.fixture
def worker(parts: tuple[Gateway, Worker]) -> Worker:
    return parts[1]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client


def parroted(text: str, length: int) -> str:
    """What a parrot says: the prompt over and over; characters, from the first."""
    return (text * (length // len(text) + 1))[:length]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """OpenAI's error object, checked for its shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in answer.text
    error: dict[str, Any] = body["error"]
    return error


# --- answers ---


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_llama_servers_names_for_the_same(gateway: Gateway, path: str) -> None:
    body = {**BODY, "messages": MESSAGES}
    short = gateway.post(path, json={**body, "n_predict": 5, "repeat_penalty": 1.1})
    assert short.status_code == 200, short.text
    assert short.headers.get("x-precast-ignored-fields", "") in ("messages", "prompt")
    assert short.json()["usage"]["completion_tokens"] == 5
    full = gateway.post(path, json={**body, "n_predict": -1})
    assert full.json()["usage"]["total_tokens"] == 256
    both = gateway.post(path, json={**body, "n_predict": 5, "max_tokens": 6})
    assert error_of(both, 400)["param"] == "n_predict"
    both = gateway.post(path, json={**body, "repeat_penalty": 2, "repetition_penalty": 2})
    assert error_of(both, 400)["param"] == "repeat_penalty"
    none = gateway.post(path, json={**body, "n_predict": 0})
    assert error_of(none, 400)["param"] == "n_predict"


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_log_probabilities_of_prompts(gateway: Gateway, path: str, top: int) -> None:
    """As vLLM shows them: by id, the prompt's own token first."""
    body = {**BODY, "messages": MESSAGES, "max_tokens": 1, "return_token_ids": True}
    answer = gateway.post(path, json={**body, "prompt_logprobs": top}).json()
    choice = answer["choices"][0]
    ids = (answer if "message" in choice else choice)["prompt_token_ids"]
    first, *others = (answer if "message" in choice else choice)["prompt_logprobs"]
    assert first is None
    assert [next(iter(one)) for one in others] == [str(token) for token in ids[1:]]
    for at, (token, one) in enumerate(zip(ids[1:], others, strict=True), 1):
        assert one[str(token)]["logprob"] == -at / 4
        assert one[str(token)]["rank"] is None
        assert [other["rank"] for other in one.values()] == [None, 1, 2][: top + 1]
    plain = gateway.post(path, json=body).json()
    assert "prompt_logprobs" not in json.dumps(plain)


def test_log_probabilities_of_prompts_and_what_is_against_them(gateway: Gateway) -> None:
    asked = {**BODY, "prompt_logprobs": 2}
    for fields in ({"stream": True}, {"echo": True, "logprobs": 1}, {"prompt_logprobs": 21}):
        answer = gateway.post("/v1/completions", json={**asked, **fields})
        assert error_of(answer, 400)["param"] == "prompt_logprobs"
    echoed = gateway.post("/v1/completions", json={**asked, "echo": True, "logprobs": 2}).json()
    choice = echoed["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == len(choice["prompt_logprobs"]) + 16


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "guided_regex": "a"}, "allowed_token_ids"),
        ({"bad_words": ["a"], "guided_regex": "a"}, "bad_words"),
        ({"bad_words": ["unheard-of " * 400, "much " * 1000]}, "bad_words"),
        ({"bad_words": ["ab"], "guided_regex": "a"}, "bad_words"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": "a"}, "bad_words"),
    ],
)
def test_tokens_that_can_not_be_forbidden(
    gateway: Gateway, path: str, fields: Any, param: str
) -> None:
    answer = gateway.post(path, json={**BODY, "messages": MESSAGES, **fields})
    assert error_of(answer, 400)["param"] == param


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_single_tokens_are_forbidden(gateway: Gateway, path: str) -> None:
    """The parrot repeats what of its prompt it may say."""
    messages = [{"role": "user", "content": "x y"}]
    body = {"model": "tiny", "prompt": "x y", "messages": messages, "return_token_ids": True}

    def said(**fields: Any) -> list[int]:
        answer = gateway.post(path, json={**body, "max_tokens": 40, **fields})
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    tokens = gateway.post("/tokenize", json={"model": "tiny", "prompt": "xy"}).json()["tokens"]
    assert set(tokens) <= set(said())
    assert set(said(allowed_token_ids=tokens[:1])) == {tokens[0]}
    assert tokens[0] in said(bad_words=["y"])
    assert not {tokens[1]} & set(said(bad_words=["y"]))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_words_of_several_tokens_are_forbidden(gateway: Gateway, path: str, stream: bool) -> None:
    """Each choice says their tokens, and never one behind the other."""
    messages = [{"role": "user", "content": "abcab"}]
    body = {"model": "tiny", "prompt": "abcab", "messages": messages, "max_tokens": 60, "n": 2}

    def said(words: list[str]) -> list[str]:
        answer = gateway.post(path, json={**body, "bad_words": words, "stream": stream})
        assert answer.status_code == 200, answer.text
        lines = answer.text.splitlines() if stream else [f"data: {answer.text}"]
        found = ["", ""]
        for line in lines:
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    message = choice.get("delta") or choice.get("message") or choice
                    found[choice["index"]] += message.get("text") or message.get("content") or ""
        return found

    for text in said(["x"]):
        assert "ab" in text and "bca" in text
    for text in said(["ab", "bca"]):
        assert "ac" in text and "ab" not in text and "bca" not in text


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30)
    choice = answer.choices[0]
    assert choice.text == parroted(PROMPT, len(choice.text))
    assert len(choice.text) > len(PROMPT)
    assert choice.finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 30


def test_a_completion_has_sixteen_tokens_by_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_streamed_completion_equals_the_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40)
    chunks = list(
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert not any("\N{REPLACEMENT CHARACTER}" in chunk.choices[0].text for chunk in chunks)
    assert len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("model", [{}, {"model": None}], ids=["left out", "null"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": MESSAGES[1:], "max_tokens": 2}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
def test_without_a_model_the_only_one_answers(
    gateway: Gateway, path: str, body: Any, model: Any
) -> None:
    answer = gateway.post(path, json=body | model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "tiny"


def test_without_a_model_there_is_a_prompt_to_count(gateway: Gateway) -> None:
    answer = gateway.post("/v1/messages/count_tokens", json={"messages": MESSAGES[1:]})
    assert answer.json()["input_tokens"] > 0, answer.text
    [own] = gateway.post("/tokenize", json={"prompt": "q"}).json()["tokens"]
    assert gateway.post("/detokenize", json={"tokens": [own]}).json() == {"prompt": "q"}
    assert gateway.get("/tokenizer_info").json()["model"] == "tiny"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=50)
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == parroted(RENDERED, len(message.content or ""))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50


def test_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    *spoken, last, totals = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in spoken)
    assert text == parroted(RENDERED, len(text))
    assert "🦊" in text
    assert last.choices[0].finish_reason == "length"
    assert totals.choices == []
    assert totals.usage is not None
    assert totals.usage.completion_tokens == 40


@pytest.mark.parametrize("n", [1, 2])
def test_usage_on_every_chunk(client: openai.OpenAI, n: int) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    for stream in (
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=9,
            n=n,
            stream=True,
            stream_options=options,
        ),
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=9, n=n, stream=True, stream_options=options
        ),
    ):
        usages = [chunk.usage for chunk in stream]
        counts = [usage.completion_tokens for usage in usages if usage is not None]
        assert len(counts) == len(usages) > 1
        assert counts == sorted(counts)
        assert counts[0] < counts[-1]  # tokens that come at once are one chunk
        assert counts[-1] == 9 * n
        assert {u.total_tokens - u.completion_tokens for u in usages if u} == {
            usages[-1].prompt_tokens if usages[-1] else None
        }


def test_an_answer_goes_back_into_the_chat(client: openai.OpenAI) -> None:
    """As SDKs do it: the message object, and its dump with every null."""
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)
    said = first.choices[0].message
    for turn in (said, said.model_dump(), {**said.model_dump(), "reasoning_content": "hm"}):
        chat: Any = [*MESSAGES, turn, {"role": "user", "content": "on"}]
        second = client.chat.completions.create(model="tiny", messages=chat, max_tokens=90)
        told = f"user: hé 🦊\nassistant: {said.content}\nuser: on\n"
        assert told in (second.choices[0].message.content or "")


def test_a_chat_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


async def test_the_asynchronous_client(gateway: Gateway) -> None:
    async with gateway.async_client() as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=40, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == parroted(RENDERED, len(text))


def test_token_ids_and_lists_of_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["the", "fox"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["the", "the", "fox", "fox"]
    answer = client.completions.create(model="tiny", prompt=[[65, 66], [67]], max_tokens=4)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert client.completions.create(model="tiny", prompt=[65, 66], max_tokens=4).choices[0].text


def test_several_choices_streamed(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, max_tokens=20, stream=True
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert sorted(finished) == [0, 1, 2]
    assert len(set(texts.values())) == 1
    assert texts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, stop=["brown", "zzz"], stream=stream
    )
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "the quick "
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_that_was_hit_is_told(client: openai.OpenAI, stream: bool) -> None:
    """As vLLM does, on both endpoints; nothing is told of other ends."""
    asked: Any = {"model": "tiny", "max_tokens": 60, "stop": ["zzz", "brown"], "stream": stream}
    chat: Any = [{"role": "user", "content": PROMPT}]
    ended = [
        client.completions.create(prompt=PROMPT, **asked),
        client.chat.completions.create(messages=chat, **asked),
        client.completions.create(prompt="a", **{**asked, "max_tokens": 3}),
    ]
    last: Any = [[*answer][-1].choices[0] if stream else answer.choices[0] for answer in ended]
    told = [(choice.model_extra or {}).get("stop_reason") for choice in last]
    assert told == ["brown", "brown", None]


def test_64_stop_strings_of_any_length(client: openai.OpenAI) -> None:
    stops = ["x" * 2000, *(f"no {index}" for index in range(62)), "brown"]
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, stop=stops)
    assert answer.choices[0].text == "the quick "
    with pytest.raises(openai.BadRequestError, match="at most 64") as caught:
        client.completions.create(model="tiny", prompt=PROMPT, stop=[*stops, "more"])
    assert caught.value.param == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the fox", max_tokens=5, logprobs=2, stream=stream
    )
    shown = [c.choices[0].logprobs for c in (list(answer) if stream else [answer])]
    found = [logprobs for logprobs in shown if logprobs is not None]
    tokens = [token for logprobs in found for token in logprobs.tokens or ()]
    offsets = [offset for logprobs in found for offset in logprobs.text_offset or ()]
    assert len(tokens) == 5
    assert offsets == [len("".join(tokens[:index])) for index in range(5)]
    assert [value for lp in found for value in lp.token_logprobs or ()] == [-0.5] * 5
    tops = [top for logprobs in found for top in logprobs.top_logprobs or ()]
    assert [len(top) for top in tops] == [3] * 5  # two, and the chosen one
    assert all(token in top for token, top in zip(tokens, tops, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=6,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    shown = [chunk.choices[0].logprobs for chunk in chunks]
    content = [token for logprobs in shown if logprobs for token in logprobs.content]
    assert len(content) == 6
    assert bytes(content[0].bytes).decode() == content[0].token
    assert [len(token.top_logprobs) for token in content] == [2] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_are_parts_of_a_character(client: openai.OpenAI, stream: bool) -> None:
    """The parrot says the prompt's tokens: an emoji's four bytes, then a letter."""
    message = {"role": "user", "content": "🦊é"}
    answer: Any = client.chat.completions.create(
        model="tiny",
        messages=[message],
        max_tokens=12,
        logprobs=True,
        top_logprobs=5,
        stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    content = [
        token for chunk in chunks if (lp := chunk.choices[0].logprobs) for token in lp.content
    ]
    assert bytes(byte for token in content for byte in token.bytes).decode() == "user: 🦊é\n"
    assert len({str(top.bytes) for top in content[6].top_logprobs}) == 5
    ids = [token.bytes for token in content[6:10]]
    assert [len(raw) for raw in ids] == [1, 1, 1, 1]


def test_parts_of_a_character_have_entries_of_their_own(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="🦊é", max_tokens=6, logprobs=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert [len(top) for top in logprobs.top_logprobs or ()] == [6] * 6
    assert logprobs.tokens[:2] == ["bytes:\\xf0", "bytes:\\x9f"]
    assert logprobs.text_offset == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the fox", max_tokens=3, echo=True, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text.startswith("the foxthe")


def test_the_event_stream_on_the_wire(gateway: Gateway) -> None:
    answer = gateway.post("/v1/completions", json={**BODY, "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert [json.loads(event[6:])["object"] for event in events[:-2]] == ["text_completion"] * 3


def test_sampling_parameters_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=2,
        temperature=0.7,
        top_p=0.9,
        seed=-5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": 10},
        user="someone",
        extra_body={"top_k": 5, "ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "length"


# --- models and operation ---


CACHED_TEXT = "lazy dog, "


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_cached_tokens_are_in_the_usage_and_salts_share_nothing(
    gateway: Gateway, endpoint: str, stream: bool
) -> None:
    text = CACHED_TEXT * (3 if stream else 2)
    given = {"prompt": text} if endpoint == "completions" else {"messages": [_user(text)]}
    body = {"model": "tiny", "max_tokens": 3, "n": 2, "stream": stream, **given}
    if stream:
        body["stream_options"] = {"include_usage": True}
    found = []
    for salt in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}):
        answer = gateway.post(f"/v1/{endpoint}", json={**body, **salt})
        assert answer.status_code == 200, answer.text
        last = answer.text.split("data: ")[-2] if stream else answer.text
        usage = json.loads(last)["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        found.append(cached // (usage["prompt_tokens"] - 1))
    assert found == [0, 1, 0, 0, 1], "the second choice finds the first one's prompt: not counted"


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "precast"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such")
    assert caught.value.code == "model_not_found"


def test_health_and_ready(gateway: Gateway) -> None:
    assert gateway.get("/health").json() == {"status": "ok"}
    counts = {"workers": 1, "connected": 1}
    assert gateway.get("/ready").json() == {"status": "ready", **counts, "models": ["tiny"]}


def test_metrics(gateway: Gateway, client: openai.OpenAI) -> None:
    list(client.completions.create(model="tiny", prompt="the", max_tokens=3, stream=True))
    values = gateway.metrics()
    assert values['gateway_requests_total{endpoint="/v1/completions",status="200"}'] >= 1
    assert values['gateway_time_to_first_token_seconds_count{model="tiny"}'] >= 1
    assert values['gateway_inter_token_seconds_count{model="tiny"}'] >= 2
    assert values['gateway_completion_tokens_total{model="tiny"}'] >= 3
    assert values["gateway_workers_ready"] == 1


# --- errors ---


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("model", ["../tiny", "..", "a/b", "\x00", "x" * 257])
def test_odd_model_names(gateway: Gateway, model: str) -> None:
    answer = gateway.post("/v1/completions", json={"model": model, "prompt": "x"})
    assert error_of(answer, answer.status_code)["param"] == "model"
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "", "prompt": "x"}, "model"),
        ({"model": "tiny"}, "prompt"),
        ({**BODY, "prompt": 5}, "prompt"),
        ({**BODY, "prompt": ""}, "prompt"),
        ({**BODY, "prompt": [70000]}, "prompt"),
        ({**BODY, "n": 0}, "n"),
        ({**BODY, "n": 1000}, "n"),
        ({**BODY, "temperature": "hot"}, "temperature"),
        ({**BODY, "logit_bias": {"70000": 1}}, "logit_bias"),
        ({**BODY, "n": 2, "best_of": 1}, "best_of"),
        ({**BODY, "best_of": 2, "stream": True}, "best_of"),
        ({**BODY, "suffix": "x", "echo": True}, "suffix"),
        ({**BODY, "max_tokens": 0}, "max_tokens"),
        ({**BODY, "min_tokens": 17}, "min_tokens"),
        ({**BODY, "prompt": ["a"] * 65, "n": 2}, "n"),
    ],
)
def test_bad_requests_name_the_field(gateway: Gateway, body: dict[str, Any], param: str) -> None:
    error = error_of(gateway.post("/v1/completions", json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"model": "tiny",}', b"[]", b"5", b"\xff\xfe", b"[" * 100_000]
)
def test_broken_json(gateway: Gateway, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = gateway.post("/v1/chat/completions", content=content, headers=headers)
    assert error_of(answer, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [{"model": "\ud800"}, {"prompt": "\ud800"}, {"stop": "\ud800"}, {"\ud800": 1}],
    ids=["model", "prompt", "stop", "unknown"],
)
def test_halves_of_characters(gateway: Gateway, fields: dict[str, Any]) -> None:
    content = json.dumps({**BODY, **fields}).encode()
    error = error_of(gateway.post("/v1/completions", content=content), 400)
    assert error["type"] == "invalid_request_error"


def test_a_body_without_content_type_is_json(gateway: Gateway) -> None:
    content = json.dumps({**BODY, "max_tokens": 1}).encode()
    assert gateway.post("/v1/completions", content=content).status_code == 200


def test_context_length(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[65] * 10, max_tokens=250)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in str(caught.value)
    assert "260 tokens (10 in the prompt, 250 for the completion)" in str(caught.value)
    long: Any = [{"role": "user", "content": "zx " * 5000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_the_default_budget_is_cut_to_the_context(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=[65] * 250)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


def test_a_template_that_refuses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no such talk") as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "refuse me"}]
        )
    assert caught.value.param == "messages"


def test_unknown_routes_and_methods(gateway: Gateway) -> None:
    assert "/v1/nothing" in error_of(gateway.get("/v1/nothing"), 404)["message"]
    assert error_of(gateway.post("/nothing", json={}), 404)
    assert "GET" in error_of(gateway.get("/v1/chat/completions"), 405)["message"]


def test_bodies_are_bounded(gateway: Gateway) -> None:
    large = {**BODY, "prompt": "x" * 300_000}
    assert error_of(gateway.post("/v1/completions", json=large), 413)["code"] == "request_too_large"

    def chunks() -> Iterator[bytes]:  # no content-length
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(30):
            yield b"x" * 10_000

    assert error_of(gateway.post("/v1/completions", content=chunks()), 413)


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("!invalid", 400, None),
        ("!context", 400, "context_length_exceeded"),
        ("!overloaded", 429, "overloaded"),
        ("!internal", 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_workers_errors(
    gateway: Gateway, prompt: str, status: int, code: str | None, stream: bool
) -> None:
    """Before the first token a stream fails with a status of its own."""
    body = {"model": "tiny", "prompt": prompt, "stream": stream}
    answer = gateway.post("/v1/completions", json=body)
    assert error_of(answer, status)["code"] == code
    assert ("retry-after" in answer.headers) == (status == 429)


def test_one_failing_choice_fails_the_request(gateway: Gateway, worker: Worker) -> None:
    body = {"model": "tiny", "prompt": ["the fox", "!internal"], "max_tokens": 200}
    error_of(gateway.post("/v1/completions", json=body), 500)
    eventually(lambda: worker.running() == 0)


def test_an_error_within_a_stream(client: openai.OpenAI, gateway: Gateway) -> None:
    stream = client.completions.create(model="tiny", prompt="!later", stream=True)
    chunks = []
    with pytest.raises(openai.APIError, match="told to fail"):
        for chunk in stream:
            chunks += [chunk]
    assert chunks
    raw = gateway.post(
        "/v1/completions", json={"model": "tiny", "prompt": "!later", "stream": True}
    )
    assert raw.status_code == 200
    last = raw.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "[DONE]" not in raw.text


# --- disconnects ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(
    gateway: Gateway, worker: Worker, stream: bool
) -> None:
    eventually(lambda: worker.running() == 0)
    body = json.dumps({"model": "tiny", "prompt": "!silent", "n": 3, "stream": stream})
    with _raw_post(gateway, body):
        eventually(lambda: worker.running() == 3)
    eventually(lambda: worker.running() == 0, deadline_s=10)


def test_a_client_that_leaves_mid_stream_frees_its_slot(gateway: Gateway, worker: Worker) -> None:
    eventually(lambda: worker.running() == 0)
    body = {"model": "tiny", "prompt": "!slow", "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, verify=PLAIN) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert worker.running() == 1
    eventually(lambda: worker.running() == 0, deadline_s=10)  # it would run for 20 s


def _raw_post(gateway: Gateway, body: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection

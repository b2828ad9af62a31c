"""``precast serve --models-on-demand``: three tiny models, memory for two, two gateways."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from precast.models.importing.adapter_import import import_adapter
from tests.support.adapters import write_adapter
from tests.support.models import write_model
from tests.support.plain_http import PLAIN
from tests.support.processes import words
from tests.support.serve_stack import NO_GRAPHS, Serve, poll, serving

pytestmark = pytest.mark.timeout(300)
NAMES = ("first", "second", "third")
MEMORY_MB = 1_600
"""A tiny model counts 768 MB for its processes."""
IDLE_S = 4
DEADLINE_S = 90.0
WORDS = "decode-worker"
FLAGS = (
    "--models-on-demand",
    f"--models-memory-mb={MEMORY_MB}",
    f"--idle-timeout={IDLE_S}",
    "--gateway-workers=2",
    "--quantization=none",
    "--batch-sizes=1,4",
    "--prefill-buckets=",
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    home = tmp_path_factory.mktemp("home")
    for number, name in enumerate(NAMES):
        write_model(home / "models" / name, rope_theta=10_000.0 + number)
    (home / "precast.toml").write_text(NO_GRAPHS)
    with serving(home, *FLAGS) as running:
        running.wait_line("Precast serves first at http://", DEADLINE_S)
        yield running


def url(stack: Serve, path: str) -> str:
    return f"http://127.0.0.1:{stack.port}{path}"


def ask(stack: Serve, model: str | None, **fields: object) -> httpx.Response:
    body = {"model": model, "prompt": "the sea", "temperature": 0, "max_tokens": 4, **fields}
    return httpx.post(
        url(stack, "/v1/completions"), json=body, timeout=DEADLINE_S, trust_env=False, verify=PLAIN
    )


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def workers(stack: Serve) -> dict[str, psutil.Process]:
    """Leaders that run, by their models."""
    found = {}
    for process in psutil.Process(stack.process.pid).children():
        line = words(process.pid)
        if WORDS in line:
            found[next(word for word in line if word.startswith("--model="))[8:]] = process
    return found


def starts(stack: Serve, model: str) -> int:
    """How often its worker became ready."""
    log = stack.home / "logs" / f"decode-worker-{model}.log"
    return log.read_text().count("decode worker ready") if log.exists() else 0


def test_lists_all_and_runs_none(stack: Serve) -> None:
    models = httpx.get(url(stack, "/v1/models"), trust_env=False, verify=PLAIN).json()["data"]
    assert [(one["id"], one["max_model_len"]) for one in models] == [(name, 256) for name in NAMES]
    assert (
        httpx.get(url(stack, "/v1/models/second"), trust_env=False, verify=PLAIN).status_code == 200
    )
    unnamed = ask(stack, None)
    assert unnamed.status_code == 400
    assert ", ".join(NAMES) in unnamed.json()["error"]["message"]
    assert httpx.get(url(stack, "/ready"), trust_env=False, verify=PLAIN).json()["workers"] == 0
    assert not workers(stack)


def test_many_first_requests_start_a_model_once(stack: Serve) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: text(ask(stack, "first")), range(8)))
    assert len(set(answers)) == 1
    assert starts(stack, "first") == 1


def test_models_take_turns_in_the_memory_that_there_is(stack: Serve) -> None:
    """Round robin by four clients: all are answered, and there are never more than two workers."""
    seen: list[int] = []

    def client(number: int) -> list[tuple[str, str]]:
        order = [NAMES[(number + turn) % len(NAMES)] for turn in range(4)]
        answers = []
        for name in order:
            answers.append((name, text(ask(stack, name))))
            seen.append(len(workers(stack)))
        return answers

    with ThreadPoolExecutor(4) as clients:
        answers = {pair for pairs in clients.map(client, range(4)) for pair in pairs}
    assert {name for name, _ in answers} == set(NAMES)
    assert len(answers) == len(NAMES)  # each says the same every time
    assert max(seen) <= 2
    assert all(starts(stack, name) for name in NAMES)


def test_adapters_come_and_go_with_their_model(stack: Serve, tmp_path: Path) -> None:
    """Listed beside it, started with it by whichever is asked for, in one process."""
    models_dir = stack.home / "models"
    plain = text(ask(stack, "second"))
    for seed, name in enumerate(("x", "y")):
        folder = write_adapter(tmp_path / name, models_dir / "second", seed=seed, lora_alpha=64)
        import_adapter(str(folder), models_dir, base="second", report=lambda _: None)
    models = httpx.get(url(stack, "/v1/models"), trust_env=False, verify=PLAIN).json()["data"]
    assert [(one["id"], one["root"], one.get("parent")) for one in models] == [
        *((name, name, None) for name in NAMES),
        *((name, "second", "second") for name in ("x", "y")),
    ]
    answers = {name: text(ask(stack, name)) for name in ("x", "second", "y")}
    assert len(set(answers.values())) == 3  # each says something else
    assert answers["second"] == plain
    assert set(workers(stack)) <= set(NAMES)
    before = starts(stack, "second")
    assert [text(ask(stack, name)) for name in answers] == list(answers.values())
    assert starts(stack, "second") == before
    assert text(ask(stack, "first")) and text(ask(stack, "third"))
    assert "second" not in workers(stack)  # which has made room, with its adapters
    assert text(ask(stack, "y")) == answers["y"]
    for name in ("x", "y"):
        shutil.rmtree(models_dir / name)
    again = httpx.get(url(stack, "/v1/models/x"), trust_env=False, verify=PLAIN)
    assert again.status_code == 200  # what was started with it serves it on
    missing = ask(stack, "z")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_a_stream_goes_on_when_its_worker_is_killed(stack: Serve) -> None:
    whole = text(ask(stack, "first", max_tokens=200, ignore_eos=True))
    body = {"model": "first", "prompt": "the sea", "temperature": 0, "max_tokens": 200}
    body |= {"stream": True, "ignore_eos": True}
    pieces: list[str] = []
    with httpx.stream(
        "POST",
        url(stack, "/v1/completions"),
        json=body,
        timeout=DEADLINE_S,
        trust_env=False,
        verify=PLAIN,
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                pieces += [choice["text"] for choice in event["choices"]]
                if len(pieces) == 2:
                    os.kill(workers(stack)["first"].pid, signal.SIGKILL)
    assert "".join(pieces) == whole


def test_what_can_t_start_is_told_with_its_reason(stack: Serve) -> None:
    folder = shutil.copytree(stack.home / "models" / "first", stack.home / "models" / "broken")
    (folder / "tokenizer.json").write_text("{}")
    answer = ask(stack, "broken")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert "'broken' could not be started" in error["message"]
    assert "tokenizer.json" in error["message"]
    assert error["type"] == "server_error"
    again = ask(stack, "broken")  # not tried again so soon
    assert (again.status_code, again.json()["error"]["message"]) == (503, error["message"])
    assert text(ask(stack, "second"))
    shutil.rmtree(folder)
    missing = ask(stack, "broken")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_idle_models_sleep_and_their_processes_are_gone(stack: Serve) -> None:
    assert text(ask(stack, "second"))
    before = psutil.Process(workers(stack)["second"].pid).children(recursive=True)
    assert before
    poll(lambda: not workers(stack), DEADLINE_S, "all sleep")
    poll(lambda: not any(one.is_running() for one in before), DEADLINE_S, "ranks have ended")
    assert stack.service("gateway").is_running()
    assert text(ask(stack, "second"))


def test_models_stop_with_serve(stack: Serve) -> None:
    assert text(ask(stack, "first"))
    leader = workers(stack)["first"]
    running = [leader, *leader.children(recursive=True)]
    stack.process.terminate()
    poll(lambda: not any(one.is_running() for one in running), DEADLINE_S, "its processes end")

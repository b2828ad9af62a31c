"""The gateway that all clients talk to. They run in an environment without the project's packages;
``PRECAST_PYTHON`` is the one that has them."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "parrot"


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Of the gateway, without a path."""
    command = [os.environ["PRECAST_PYTHON"], "-m", "tests.clients.stack"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stack:
        assert stack.stdout is not None
        found = None
        for line in stack.stdout:
            if found := re.search(r"http://\S+", line):
                break
        assert found is not None, "the gateway didn't start"
        yield found[0]
        assert stack.stdin is not None
        stack.stdin.close()


@pytest.fixture(scope="session")
def base(url: str) -> str:
    """What clients of OpenAI's API are told."""
    os.environ["OPENAI_API_KEY"] = "none"
    os.environ["OPENAI_BASE_URL"] = f"{url}/v1"
    return f"{url}/v1"


def say(text: str) -> str:
    """A prompt that the worker answers with this text."""
    return f"!say {text} !end"

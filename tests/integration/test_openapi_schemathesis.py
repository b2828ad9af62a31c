"""``/openapi.json`` against what the server does, as schemathesis finds it with all its checks."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.gateway_stack import Gateway, running_stack

FEWEST_CASES = 30
MODELS_LIMITS = """\
# no schema can say what a model's vocabulary and context still refuse
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "429"]
"""


NO_ANSWER = ("/ready", "/tokenizer_info")
"""Without a model."""
SIMILAR = ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize")
"""Their bodies are made of what chats' are: to try each bound of these again takes minutes."""


def test_schemathesis_finds_nothing_without_a_model(redis_url: str, tmp_path: Path) -> None:
    """Every valid request is a 404, and all checks hold."""
    with running_stack(redis_url, tmp_path) as stack:
        gateway = stack.gateway(wait_for=0)
        find_nothing(gateway, tmp_path, "coverage", *excluded(*NO_ANSWER, *SIMILAR))
        find_nothing(gateway, tmp_path, "fuzzing", *excluded(*NO_ANSWER))


def test_schemathesis_finds_nothing_with_a_model(redis_url: str, tmp_path: Path) -> None:
    config = tmp_path / "limits.toml"
    config.write_text(MODELS_LIMITS)
    with running_stack(redis_url, tmp_path) as stack:
        stack.worker(step_ms=1)
        find_nothing(stack.gateway(), tmp_path, "fuzzing", config=config)


def excluded(*paths: str) -> list[str]:
    return [option for path in paths for option in ("--exclude-path", path)]


def find_nothing(
    gateway: Gateway, folder: Path, phases: str, *options: str, config: Path | None = None
) -> None:
    configured = () if config is None else ("--config-file", str(config))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", *configured),
        *("run", f"{gateway.url}/openapi.json", "--checks", "all"),
        *("--phases", phases, "--max-examples", "10", "--seed", "1", "--no-color"),
        *options,
        *("--warnings", "off", "--generation-database", "none"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=folder)
    assert found.returncode == 0, found.stdout + found.stderr
    generated = re.search(r"(\d+) generated", found.stdout)
    assert generated is not None, found.stdout
    assert int(generated[1]) > FEWEST_CASES

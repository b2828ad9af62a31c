"""What the clients talk to: a gateway with one worker, run by the project's own Python.

``python -m tests.clients.stack`` prints the gateway's URL, the worker's address and the model's
folder, and serves until its stdin is closed. The worker is a parrot; ``--model NAME`` has a real
one: ``random``, a tiny one with random weights, or a model that ``precast models import`` knows.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from precast.models.importing.importer import import_model
from precast.system.redis_server import start_redis
from tests.support.decode_worker import decode_worker
from tests.support.gateway_stack import Stack, make_model_folder, running_stack
from tests.support.models import write_model

PARROT: Final = "parrot"
TINY: Final = "random"
TEMPLATE: Final = (
    "{% if tools %}system: {{ tools | tojson }} <tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTEXT: Final = 4096


def make_tiny(folder: Path) -> None:
    """Random weights, a token for each byte, and a template."""
    write_model(folder, max_position_embeddings=CONTEXT)
    config = {
        "chat_template": TEMPLATE,
        "eos_token": "<eos>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@contextmanager
def worker_of(stack: Stack, model: str) -> Iterator[str]:
    """One worker of the model; its address."""
    folder = stack.models_dir / model
    if model == PARROT:
        make_model_folder(stack.models_dir, model, template=TEMPLATE)
        yield f"127.0.0.1:{stack.worker(model=model, max_context_length=8192).port}"
        return
    if model == TINY:
        make_tiny(folder)
    else:
        import_model(model, stack.models_dir, report=lambda _: None)
    home = stack.models_dir.parent
    settings = {"max_context_length": CONTEXT if model == TINY else 2048, "batch_sizes": "1,4"}
    with decode_worker(home, stack.redis_url, model, **settings) as worker:
        yield worker.address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=PARROT)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with (
            start_redis(home / "redis") as redis,
            running_stack(redis.url, home) as stack,
            worker_of(stack, model) as address,
        ):
            gateway = stack.gateway(responses_lifetime_s=600)
            print(gateway.url, address, stack.models_dir / model, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()

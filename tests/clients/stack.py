"""What the clients talk to: a gateway with one parrot worker, run by the project's own Python.

``python -m tests.clients.stack`` prints the gateway's URL and serves until its stdin is closed.
"""

import sys
import tempfile
from pathlib import Path

from precast.system.redis_server import start_redis
from tests.support.gateway_stack import make_model_folder, running_stack

MODEL = "parrot"
TEMPLATE = (
    "{% if tools %}system: {{ tools | tojson }} <tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with start_redis(home / "redis") as redis, running_stack(redis.url, home) as stack:
            make_model_folder(home / "models", MODEL, template=TEMPLATE)
            stack.worker(model=MODEL, max_context_length=8192)
            print(stack.gateway().url, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()

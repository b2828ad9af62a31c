"""Services killed at random while sets of graphs are captured and requests run.

``python -m tests.support.chaos --kills 200 --seed 1`` prints what happened as JSON.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from precast.graphs.artifacts.disk_store import TEMPORARY, DiskStore
from precast.graphs.artifacts.signing import TrustedKeys
from tests.support.capture_program import factors_of
from tests.support.chaos_stack import CALM_S, MODEL, TOKENS, Chaos, chaos
from tests.support.compile_worker import starts, wait_until
from tests.support.http_load import Load, Outcome, check_outcomes

CLIENTS = 3
LEFTOVERS_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What happened."""

    kills: dict[str, int]
    graphs: int
    """Published in the end."""
    captures: int
    """Begun: more than graphs where one was killed."""
    outcomes: Sequence[Outcome]
    seconds: float

    def encode(self) -> str:
        finished = sum(outcome.finished for outcome in self.outcomes)
        shown = {name: value for name, value in vars(self).items() if name != "outcomes"}
        errors = len(self.outcomes) - finished
        return json.dumps({**shown, "finished": finished, "ended_with_an_error": errors})


def run(home: Path, *, kills: int, seed: int) -> Summary:
    """Kill as often, let everything come to rest, and check what must hold."""
    begun = time.monotonic()
    with chaos(home, seed) as stack:
        gateway = stack.gateway()
        with Load(
            url=gateway.url,
            model=MODEL,
            prompt="once upon a time",
            max_tokens=TOKENS,
            clients=CLIENTS,
            pause_s=0.05,
        ) as load:
            for _ in range(kills):
                stack.kill_one()
            stack.revive(1.0)
            keys = stack.complete()
            wait_until(stack.settled, CALM_S)
            wait_until(lambda: gateway.workers() == len(stack.decode_addresses), CALM_S)
            finished = load.good()
            wait_until(lambda: load.good() > finished, CALM_S)
        _check_requests(load.outcomes)
        _check_store(home, keys)
        _check_logs(stack)
        _check_captures(stack, keys)
        return Summary(
            kills=dict(sorted(stack.kills.items())),
            graphs=len(keys),
            captures=len(starts(stack.ledger)),
            outcomes=load.outcomes,
            seconds=round(time.monotonic() - begun, 1),
        )


def _check_requests(outcomes: Sequence[Outcome]) -> None:
    """Each ended in time: whole and with the right text, or with an error of OpenAI's shape."""
    check_outcomes(list(outcomes))
    texts = Counter(outcome.text for outcome in outcomes if outcome.finished)
    assert len(texts) == 1, texts


def _check_store(home: Path, keys: Sequence[str]) -> None:
    """All graphs are there, whole, signed, and each published once."""
    store, trusted = DiskStore(home / "store"), TrustedKeys.load(home / "keys" / "trusted")
    assert store.published_keys() == sorted(set(keys))
    for key in keys:
        assert store.versions(key) == [1], f"{key} was published again"
        assert store.put_aside(key) == {}
        artifact = store.open(key)
        trusted.verify(artifact.manifest_bytes, artifact.signature)
        assert factors_of(artifact.graph_path), f"{key} is not what a capture has written"
    # where Redis forgot who was at work, a second capture of a graph may be ending
    wait_until(lambda: not _leftovers(home), LEFTOVERS_S)


def _leftovers(home: Path) -> list[Path]:
    folders = (home / "store" / TEMPORARY, home / "captures")
    return [path for folder in folders for path in folder.iterdir()]


def _check_captures(stack: Chaos, keys: Sequence[str]) -> None:
    """No two publications; nothing captured again but what was killed or forgotten by Redis."""
    lines = [json.loads(line) for line in stack.logs("compile").splitlines()]
    published = Counter(line["key"] for line in lines if line["event"] == "graph published")
    assert set(published.values()) == {1}, "published twice"
    again = len(starts(stack.ledger)) - len(keys)
    assert again <= 2 * stack.kills["compile"] + stack.kills["redis"], f"{again} captured again"


def _check_logs(stack: Chaos) -> None:
    """Ranks have loaded graphs and refused none; no service met an error that it didn't expect."""
    loaded = stack.logs("decode")
    assert "graph loaded" in loaded
    assert "graph refused" not in loaded
    assert "artifact rejected" not in loaded
    for kind in ("decode", "compile"):
        assert "Traceback" not in stack.logs(kind), stack.home


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.chaos")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="precast-chaos-", ignore_cleanup_errors=True) as home:
        summary = run(Path(home), kills=arguments.kills, seed=arguments.seed)
    print(summary.encode())


if __name__ == "__main__":
    main()

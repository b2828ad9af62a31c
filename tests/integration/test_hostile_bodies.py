"""Some of the bodies that ``tests.support.hostile_bodies`` makes: it has more."""

from pathlib import Path

from tests.support.decode_worker import decode_worker
from tests.support.gateway_stack import Stack
from tests.support.hostile_bodies import MODEL, batter


def test_nothing_that_is_sent_is_an_error_of_the_server(tiny_home: Path, tiny_redis: str) -> None:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        with decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1,4") as worker:
            found = batter(stack.gateway(responses_lifetime_s=60), worker, count=400, seed=7)
    finally:
        for process in stack.started:
            process.kill()
            process.wait()
    assert found.wrong == []
    assert found.statuses[200] > 50, "some of them are good"
    assert found.statuses[400] > 100, "and many are not"

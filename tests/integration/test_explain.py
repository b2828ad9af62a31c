"""Why a graph is missing: over gRPC, on the command line, in a decode worker's log."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from tests.support.command import precast
from tests.support.compile_worker import BUILD, FACTORS, compile_worker, connect
from tests.support.decode_worker import decode_worker, eventually
from tests.support.models import write_model

FAILED, PUBLISHED = pb.GRAPH_PHASE_FAILED, pb.GRAPH_PHASE_PUBLISHED


def differences(near: pb.NearGraph) -> dict[str, tuple[str | None, str | None]]:
    return {
        d.name: (
            d.wanted if d.HasField("wanted") else None,
            d.have if d.HasField("have") else None,
        )
        for d in near.differences
    }


def explained(*arguments: Any) -> Any:
    """What ``precast graphs explain --json`` prints."""
    return json.loads(precast("graphs", "explain", "--json", *arguments).stdout)


async def test_nearest_graphs_and_the_factors_that_differ(tmp_path: Path, redis_url: str) -> None:
    with compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger") as worker:
        async with connect(worker) as client:
            far = {**FACTORS, "num_tokens": "2", "isa": "x86-64-v4"}
            refused = {**FACTORS, "architecture": "refuse"}
            states = await client.request(FACTORS, far, refused)
            here, there, failed = (state.key for state in states)
            await client.until([here, there, failed], PUBLISHED, FAILED)

            other_build = {**FACTORS, **BUILD, "compiler": "test 2.0", "host": "x"}
            del other_build["torch"]
            request = pb.ExplainGraphRequest(spec=pb.GraphSpec(factors=other_build))
            answer = await client.graphs.ExplainGraph(request, timeout=30)
            assert [near.key for near in answer.nearest] == [here, there]
            assert differences(answer.nearest[0]) == {
                "compiler": ("test 2.0", "test 1.0"),
                "host": ("x", None),
                "torch": (None, FACTORS["torch"]),
            }
            assert not answer.HasField("state")

            request = pb.ExplainGraphRequest(key=failed, limit=1)
            answer = await client.graphs.ExplainGraph(request, timeout=30)
            [near] = answer.nearest
            assert (near.key, differences(near)) == (here, {"architecture": ("refuse", "llama")})
            assert (answer.state.phase, "kv_heads is odd" in answer.state.error) == (FAILED, True)

            for wrong in (
                pb.ExplainGraphRequest(),
                pb.ExplainGraphRequest(spec=pb.GraphSpec(factors={"x": "y" * 5000})),
                pb.ExplainGraphRequest(spec=pb.GraphSpec(factors={str(i): "" for i in range(200)})),
                pb.ExplainGraphRequest(key="0" * 32),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=r"INVALID_ARGUMENT|NOT_FOUND"):
                    await client.graphs.ExplainGraph(wrong, timeout=30)

        # on the command line: by key, by factors, in a table
        [value] = explained(here[:10], "--address", worker.address)
        assert value["phase"] == "published"
        assert value["nearest"][0] == {
            "key": here,
            "version": 1,
            "models": ["tiny"],
            "differences": {},
        }
        file = tmp_path / "factors.json"
        file.write_text(json.dumps({**FACTORS, "block_size": "16"}))
        command = ("--factors", file, "--address", worker.address)
        [value] = explained(*command)
        assert value["nearest"][0]["differences"] == {"block_size": {"wanted": "16", "have": "32"}}
        table = precast("graphs", "explain", *command).stdout
        assert all(word in table for word in ("block_size", "16", "32", here[:12]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say which graph"),
        (["abc", "--worker", "x"], "say which graph"),
        (["--factors", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_wrong_question_is_one_line(arguments: list[str], said: str) -> None:
    done = precast("graphs", "explain", *arguments)
    assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (2, True, 1)


async def test_a_decode_worker_says_why_it_has_no_graph(tmp_path: Path, redis_url: str) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    write_model(home / "models" / "tiny")
    with compile_worker(home, redis_url, ledger) as compiler:
        async with connect(compiler) as client:
            [state] = await client.request(FACTORS)
            await client.until([state.key], PUBLISHED)
        (ledger / "closed").touch()
        await asyncio.to_thread(says_why, home, redis_url, compiler.address, ledger)


def says_why(home: Path, redis_url: str, compiler: str, ledger: Path) -> None:
    with decode_worker(home, redis_url, "tiny", batch_sizes="1,4") as worker:
        eventually(lambda: worker.log.read_text().count("graph missing") == 2)
        assert "num_tokens: wanted 4, have 1" in worker.log.read_text()
        link = ("--address", compiler, "--redis-url", redis_url)
        [value] = explained("--worker", worker.address, "--num-tokens", 4, *link)
        assert value["factors"]["num_tokens"] == "4"
        assert value["nearest"][0]["differences"]["num_tokens"] == {"wanted": "4", "have": "1"}
        missing = explained("--worker", "decode-", *link)
        assert [value["factors"]["num_tokens"] for value in missing] == ["1", "4"]
        refused = precast("graphs", "explain", "--worker", worker.address, "--num-tokens", 3, *link)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "num_tokens = 3" in refused.stderr

"""The command line: flags are settings, errors are one line, and it starts light."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.main import get_command
from typer.testing import CliRunner

from precast.cli import stack
from precast.cli.main import app
from precast.cli.on_demand.parts import HomeAdapter, HomeModel
from precast.cli.options import settings_command
from precast.cli.serve import check_adapters, gateway_url, named, needed, warn_if_open
from precast.cli.status import ServiceState, Status
from precast.cli.tables import identifier
from precast.config.settings import (
    CommonSettings,
    CompileWorkerSettings,
    DecodeWorkerSettings,
    GatewaySettings,
    ServeSettings,
    load_settings,
)
from precast.errors import ConfigError
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.signing import load_or_create_signer
from precast.system.redis_server import RedisServer
from tests.support.artifacts import graph_file, manifest_for, signed
from tests.support.command import precast
from tests.support.forked import ISA
from tests.support.models import write_model
from tests.support.ports import free_port

COMMANDS: dict[str, type[CommonSettings]] = {
    "serve": ServeSettings,
    "gateway": GatewaySettings,
    "compile-worker": CompileWorkerSettings,
    "decode-worker": DecodeWorkerSettings,
}


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECAST_") and name != ISA:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PRECAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_starts_without_the_heavy_libraries() -> None:
    program = "import sys, precast.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    heavy = {"torch", "transformers", "numpy", "grpc", "redis", "fastapi", "tokenizers"}
    assert done.returncode == 0
    assert not heavy & set(done.stdout.split())


def test_a_leader_has_no_torch() -> None:
    """Its ranks have it. It would cost the leader 180 MB, and a second of its start."""
    program = "import sys, services.decode_worker.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_a_flag_with_its_help(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    flags = {option for parameter in command.params for option in parameter.opts}
    for setting, field in COMMANDS[name].model_fields.items():
        assert f"--{setting.replace('_', '-')}" in flags
        if field.description:
            shown = next(p for p in command.params if p.name == setting)
            assert field.description.split()[0].strip("`") in shown.help


def test_flags_reach_the_settings_and_win_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[DecodeWorkerSettings] = []
    one = typer.Typer()
    one.command()(settings_command(DecodeWorkerSettings, seen.append, "x"))
    monkeypatch.setenv("PRECAST_TP", "4")
    monkeypatch.setenv("PRECAST_QUANTIZATION", "int8")
    flags = ["--tp=2", "--batch-sizes=4,1", "--wait-for-graphs", "--compile-address=h:1"]
    result = CliRunner().invoke(one, flags)
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert (settings.tp, settings.quantization, settings.batch_sizes) == (2, "int8", (1, 4))
    assert settings.wait_for_graphs
    assert settings.compile_address == "h:1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["decode-worker", "--tp", "zero"], "tp = 'zero' (flag)"),
        (["gateway", "--port", "99999"], "port = '99999' (flag)"),
        (["compile-worker", "--listen", "nonsense"], "listen = 'nonsense' (flag)"),
        (["serve", "--batch-sizes", "1,x"], "batch_sizes"),
        (["serve", "--model", "../x"], "model = '../x' (flag)"),
        (["models", "import", "/no/such/folder"], "/no/such/folder"),
        (["graphs", "recompile"], "say which graphs"),
    ],
)
def test_a_wrong_value_is_one_line_and_code_2(arguments: Sequence[str], said: str) -> None:
    done = precast(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_variable_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_LOG_LEVEL", "loud")
    done = precast("gateway")
    assert done.returncode == 2
    assert "log_level = 'loud' (PRECAST_LOG_LEVEL)" in done.stderr


def test_services_log_their_settings_with_the_source() -> None:
    # no model is there: the worker ends, but has said its settings before
    done = precast("decode-worker", "--model", "nope", "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nope" in done.stderr.splitlines()[-1]
    model = next(line for line in done.stderr.splitlines() if "name=model " in line)
    assert "source=flag" in model
    home = next(line for line in done.stderr.splitlines() if "name=home " in line)
    assert "source=PRECAST_HOME" in home


def test_models_list(tmp_path: Path) -> None:
    write_model(tmp_path / "home" / "models" / "tiny")
    write_model(tmp_path / "home" / "models" / "bad").joinpath("config.json").write_text("x")
    done = precast("models", "list", "--json")
    assert done.returncode == 0
    bad, tiny = json.loads(done.stdout)
    assert "config.json" in bad["problem"]
    assert tiny["architecture"] == "llama"
    assert "tiny" in precast("models", "list").stdout


def test_graphs_without_a_compile_worker(redis_server: RedisServer) -> None:
    done = precast("graphs", "list", "--redis-url", redis_server.url)
    assert done.returncode == 1
    assert "no compile worker has a lease" in done.stderr
    done = precast("graphs", "list", "--address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert done.stderr.startswith("precast: compile worker at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_graphs_as_a_file_fail_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"x" * 2000)
    for arguments, code, reason in (
        (("export", "out.tar"), 1, "no graph to export"),
        (("import", "none.tar"), 2, "none.tar: No such file"),
        (("import", "noise"), 1, "no bundle of graphs"),
        (("import", "noise", "--cache"), 1, "no bundle of graphs"),
    ):
        done = precast("graphs", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert reason in done.stderr
    assert not list(tmp_path.glob("*out.tar*"))


def test_graphs_go_through_a_pipe(tmp_path: Path) -> None:
    home = tmp_path / "home"
    signer = load_or_create_signer(home / "keys" / "signing.key", home / "keys" / "trusted")
    path = graph_file(tmp_path)
    manifest = manifest_for(path.read_bytes())
    DiskStore(home / "store").publish(*signed(manifest, signer), path)
    command = [sys.executable, "-m", "precast", "graphs"]
    exported = subprocess.run([*command, "export", "-"], capture_output=True, timeout=60)
    assert (exported.returncode, exported.stderr) == (0, b"graphs written: 1\n")
    imported = subprocess.run(
        [*command, "import", "-", "--cache"],
        input=exported.stdout,
        capture_output=True,
        timeout=60,
    )
    assert (imported.returncode, imported.stdout) == (0, b"graphs imported: 1\n")
    cached = DiskStore(home / "cache" / "graphs").open(manifest.key)
    assert cached.graph_path.read_bytes() == path.read_bytes()


def test_keys_are_rotated_trusted_and_revoked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    old = load_or_create_signer(home / "keys" / "signing.key", home / "keys" / "trusted").id
    rotated = precast("keys", "rotate")
    assert rotated.returncode == 0, rotated.stderr
    rows = json.loads(precast("keys", "list", "--json").stdout)
    [new] = [row["signer"] for row in rows if row["signs_here"]]
    assert {row["signer"] for row in rows} == {old, new}
    assert f"signs from now on: {new} (before: {old})" in rotated.stdout
    other = str(tmp_path / "other")
    done = precast("keys", "trust", f"home/keys/trusted/{new}.pub", "--trusted-keys-dir", other)
    assert done.stdout == f"trusted: {new}\n"
    assert [path.name for path in Path(other).iterdir()] == [f"{new}.pub"]
    for arguments, reason in (
        (("revoke", new), "rotate first"),
        (("revoke", "none"), "0 trusted keys"),
        (("trust", "home/keys/signing.key"), "trusted key"),
        (("rotate", "--home", "nowhere"), "none to replace"),
    ):
        done = precast("keys", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert reason in done.stderr
    assert precast("keys", "revoke", old).stdout == f"revoked: {old}\n"
    listed = precast("keys", "list").stdout
    assert (new in listed, old in listed) == (True, False)


def test_what_commands_take_is_never_cut(tmp_path: Path) -> None:
    """Ids of keys, in a pipe and on a narrow terminal."""
    made = precast("keys", "api", "create", "n" * 60, "--home", str(tmp_path))
    key_id = made.stdout.split("_")[1]
    piped = precast("keys", "api", "list", "--home", str(tmp_path)).stdout
    assert key_id in piped
    assert "n" * 60 in piped
    narrow = io.StringIO()
    rows = Table(identifier("id", [key_id]), "name", "scopes")
    rows.add_row(key_id, "n" * 60, "inference")
    Console(file=narrow, width=40).print(rows)
    assert key_id in narrow.getvalue()


def test_serve_names_the_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = precast("serve", "--port", str(port))
    assert done.returncode == 2
    assert f"port = {port}: in use" in done.stderr


def test_serve_refuses_a_port_twice() -> None:
    port = free_port()
    settings = load_settings(ServeSettings, port=port, compile_port=port)
    with pytest.raises(ConfigError, match="the same as port"):
        stack.plan(settings)


def test_serve_uses_a_redis_that_is_named_and_answers(redis_server: RedisServer) -> None:
    ports = {"port": free_port(), "compile_port": free_port(), "decode_port": 0}
    plan = stack.plan(load_settings(ServeSettings, redis_url=redis_server.url, **ports))
    assert not plan.embedded_redis
    assert [spec.name for spec in plan.specs] == ["compile-worker", "gateway", "decode-worker"]
    own = stack.plan(load_settings(ServeSettings, **ports))
    assert own.embedded_redis
    assert own.specs[0].name == "redis"


def test_serve_runs_a_worker_for_each_model(redis_server: RedisServer) -> None:
    ports = {"port": free_port(), "compile_port": free_port(), "decode_port": 0}
    models = {"model": "a", "more_models": "org/b,org/c/d.gguf"}
    settings = named(load_settings(ServeSettings, redis_url=redis_server.url, **ports, **models))
    assert (settings.model, settings.more_models) == ("a", ("b", "d"))
    plan = stack.plan(settings)
    workers = [spec for spec in plan.specs if spec.name in stack.worker_names(plan)]
    assert [spec.name for spec in workers] == [
        "decode-worker",
        "decode-worker-b",
        "decode-worker-d",
    ]
    assert [stack.model_of(spec) for spec in workers] == ["a", "b", "d"]
    assert {(spec.command[3], spec.fork[0]) for spec in workers} == {("decode-worker",) * 2}
    gateway = next(spec for spec in plan.specs if spec.name == "gateway")
    assert "--expected-models=a,b,d" in gateway.command
    with pytest.raises(ConfigError, match="two are called b"):
        named(load_settings(ServeSettings, model="org/b", more_models="b"))


def test_serve_gives_adapters_to_its_first_model(redis_server: RedisServer) -> None:
    given = {"port": free_port(), "compile_port": free_port(), "decode_port": 0}
    given |= {"redis_url": redis_server.url, "model": "a", "more_models": "b"}
    plan = stack.plan(load_settings(ServeSettings, **given, adapter="x=/x,y=/y"))
    commands = {spec.name: set(spec.command) for spec in plan.specs}
    assert "--adapter=x=/x,y=/y" in commands["decode-worker"]
    assert "--adapter=" in commands["decode-worker-b"]  # whatever a variable says
    assert "--expected-models=a,b,x,y" in commands["gateway"]


def test_serve_looks_for_adapters_before_it_starts_anything(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "x")
    for given, said in (
        ({"adapter": "y"}, "no adapter of this name is in"),
        ({"adapter": "x"}, "no adapter of this name is in"),
        ({"adapter": "x=/x", "models_on_demand": True}, "has a folder of this name"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_adapters(load_settings(ServeSettings, home=tmp_path, **given))
    check_adapters(load_settings(ServeSettings, home=tmp_path, adapter="x=/x"))


def test_serve_on_demand_starts_no_worker_and_tells_gateways_whom_to_ask(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    ports = {"port": free_port(), "compile_port": free_port(), "decode_port": 0}
    given = {"home": tmp_path, "redis_url": redis_server.url, "models_on_demand": True, **ports}
    settings = load_settings(ServeSettings, **given)
    plan = stack.plan(settings)
    assert [spec.name for spec in plan.specs] == ["compile-worker", "gateway"]
    assert f"--model-host={plan.model_host}" in plan.specs[1].command
    assert needed(settings) == (settings.model,)  # nothing else is there
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert needed(settings) == ()
    assert needed(load_settings(ServeSettings, **given, model="org/b")) == ("org/b",)
    model = HomeModel(name="mine", created=1, context_length=64, kv_blocks=7, nbytes=1)
    worker = stack.on_demand(settings, model)
    assert worker.name == "decode-worker-mine"
    flags = {"--model=mine", "--kv-blocks=7", "--max-context-length=64", "--adapter="}
    assert flags < set(worker.command)
    given = (("a", "a=/x"), ("b", "b"))
    adapters = tuple(HomeAdapter(name=name, created=1, setting=text) for name, text in given)
    worker = stack.on_demand(settings, replace(model, adapters=adapters))
    assert "--adapter=a=/x,b" in worker.command


@pytest.mark.parametrize(
    ("first", "second", "starting"),
    [
        ("not started", "not started", True),
        ("starting", "not started", True),
        ("ready", "not started", False),
        ("restarting", "not started", False),  # what is wrong with one does not keep the others
    ],
)
def test_a_further_worker_waits_for_those_before(first: str, second: str, starting: bool) -> None:
    services = [
        ServiceState(name=name, state=state, pid=None)
        for name, state in (("decode-worker", first), ("decode-worker-b", second))
    ]
    status = Status(services=services, captures=None, ready=False)
    assert status.is_starting("decode-worker", but=["decode-worker-b"]) is starting


def test_a_password_of_redis_is_in_no_command_line_and_no_error(redis_server: RedisServer) -> None:
    ports = {"port": free_port(), "compile_port": free_port(), "decode_port": 0}
    url = f"{redis_server.url}?password=secret"
    plan = stack.plan(load_settings(ServeSettings, redis_url=redis_server.url, **ports))
    assert not any(
        "redis://" in word for spec in plan.specs for word in (*spec.command, *spec.fork)
    )
    gone = url.replace(str(redis_server.url.rpartition(":")[2].partition("/")[0]), "1")
    for command in (("graphs", "list"), ("workers", "list"), ("serve",)):
        done = precast(*command, "--redis-url", gone.replace("127.0.0.1", "localhost."))
        assert done.returncode != 0
        assert "secret" not in done.stdout + done.stderr


def test_serve_owns_its_home(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=f"process {os.getpid()} already serves")
    with stack.sole_owner(tmp_path), refused, stack.sole_owner(tmp_path):
        pass
    with stack.sole_owner(tmp_path):
        pass


@pytest.mark.parametrize("elsewhere", [False, True])
def test_serve_looks_for_api_keys_where_the_gateway_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    keys = tmp_path / ("elsewhere" if elsewhere else "home/keys/api")
    if elsewhere:
        monkeypatch.setenv("PRECAST_API_KEYS_DIR", str(keys))
    settings = load_settings(ServeSettings, host="0.0.0.0")

    def said() -> str:
        written = io.StringIO()
        warn_if_open(Console(file=written, width=200), settings)
        return written.getvalue()

    assert "there are no API keys" in said()
    keys.mkdir(parents=True)
    assert said() == ""


def test_serve_finds_a_gateway_with_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever port it has: the gateway's own defaults don't matter."""
    settings = load_settings(ServeSettings, home=tmp_path, port=8001)
    assert gateway_url(settings) == "http://127.0.0.1:8001"
    for name in ("CERTIFICATE", "KEY"):
        monkeypatch.setenv(f"PRECAST_HTTPS_{name}", str(tmp_path / name))
    assert gateway_url(settings) == "https://127.0.0.1:8001"

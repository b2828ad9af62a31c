"""Settings: which source wins, and one line for what is wrong."""

import os
import socket
from pathlib import Path

import pytest

from precast.cli.stack import Stack, for_children
from precast.config.settings import (
    SETTINGS,
    CommonSettings,
    CompileWorkerSettings,
    DecodeWorkerSettings,
    GatewaySettings,
    ServeSettings,
    describe,
    load_settings,
)
from precast.errors import ConfigError


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings file in the working directory and no ``PRECAST_`` variables."""
    for name in list(os.environ):
        if name.startswith("PRECAST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def rows(settings: CommonSettings) -> dict[str, tuple[str, str]]:
    return {row.name: (row.value, row.source) for row in describe(settings)}


def refusal(cls: type[CommonSettings], **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(cls, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("cls", SETTINGS)
def test_defaults_are_valid(cls: type[CommonSettings]) -> None:
    settings = load_settings(cls)
    assert {row.source for row in describe(settings)} == {"default"}
    assert settings.home == Path.home() / ".precast"


def test_flag_over_environment_over_file_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("precast.toml").write_text(
        'log_level = "debug"\n[gateway]\nhost = "file"\nport = 1\nmax_in_flight = 5\n'
        '[decode-worker]\nmodel = "other"\n'
    )
    monkeypatch.setenv("PRECAST_HOST", "environment")
    monkeypatch.setenv("PRECAST_PORT", "2")
    got = rows(load_settings(GatewaySettings, port=3, request_timeout_s=None))
    assert got["port"] == ("3", "flag")
    assert got["host"] == ("environment", "PRECAST_HOST")
    assert got["max_in_flight"] == ("5", "precast.toml")
    assert got["log_level"] == ("debug", "precast.toml")
    assert got["request_timeout_s"][1] == "default"
    assert load_settings(DecodeWorkerSettings).model == "other"


def test_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "elsewhere.toml"
    monkeypatch.setenv("PRECAST_CONFIG", str(path))
    assert str(path) in refusal(GatewaySettings)
    path.write_text("[gateway]\nport = 9\n")
    assert rows(load_settings(GatewaySettings))["port"] == ("9", str(path))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("prot = 1", "prot = 1: unknown setting"),
        ("port = 1", "port = 1: unknown setting"),
        ("[gateway]\nprot = 1", "[gateway] prot = 1: unknown setting"),
        ("[decode-worker]\nprot = 1", "[decode-worker] prot = 1: unknown setting"),
        ("[gatway]\nport = 1", "gatway"),
        ("gateway = 1", "gateway must be a table"),
        ("port = = 1", "precast.toml"),
        ("[gateway]\nport = 'x'", "port = 'x' (precast.toml)"),
    ],
)
def test_wrong_files(content: str, named: str) -> None:
    Path("precast.toml").write_text(content)
    assert named in refusal(GatewaySettings)


@pytest.mark.parametrize(
    ("cls", "flags", "named"),
    [
        (GatewaySettings, {"port": "abc"}, "port = 'abc' (flag)"),
        (GatewaySettings, {"port": 70_000}, "port = 70000 (flag)"),
        (GatewaySettings, {"prot": 1}, "prot = 1 (flag): unknown setting"),
        (GatewaySettings, {"log_level": "loud"}, "log_level = 'loud'"),
        (GatewaySettings, {"redis_url": "localhost"}, "redis_url = 'localhost'"),
        (CompileWorkerSettings, {"listen": "7100"}, "listen = '7100' (flag): must be host:port"),
        (DecodeWorkerSettings, {"batch_sizes": "1,x"}, "batch_sizes = "),
        (DecodeWorkerSettings, {"batch_sizes": "0,1"}, "different sizes of at least 1"),
        (DecodeWorkerSettings, {"batch_sizes": "2,2"}, "different sizes of at least 1"),
        (DecodeWorkerSettings, {"cores": "a"}, "cores = 'a'"),
        (DecodeWorkerSettings, {"cores": "0", "tp": 2}, "cores names 1 CPUs, too few for tp = 2"),
        (DecodeWorkerSettings, {"max_batch_size": 4}, "max_batch_size = 4 is less than"),
        (DecodeWorkerSettings, {"model": "../up"}, "model = '../up'"),
        (DecodeWorkerSettings, {"quantization": "int3"}, "quantization = 'int3'"),
        (DecodeWorkerSettings, {"tp": 0}, "tp = 0"),
    ],
)
def test_wrong_values(cls: type[CommonSettings], flags: dict[str, object], named: str) -> None:
    assert named in refusal(cls, **flags)


def test_wrong_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_TP", "two")
    assert "tp = 'two' (PRECAST_TP)" in refusal(DecodeWorkerSettings)


def test_all_wrong_settings_are_named_at_once() -> None:
    line = refusal(DecodeWorkerSettings, tp=0, block_size=1)
    assert "tp = 0" in line and "block_size = 1" in line


def test_lists_from_text_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(DecodeWorkerSettings, batch_sizes="4, 1").batch_sizes == (1, 4)
    assert load_settings(DecodeWorkerSettings, batch_sizes=(4, 1)).max_batch_size == 4
    monkeypatch.setenv("PRECAST_CORES", "0,2-3")
    Path("precast.toml").write_text("[decode-worker]\nbatch_sizes = [3]\n")
    settings = load_settings(DecodeWorkerSettings)
    assert (settings.cores, settings.batch_sizes) == ((0, 2, 3), (3,))


def test_paths_follow_home() -> None:
    settings = load_settings(DecodeWorkerSettings, home="here", model="m")
    assert settings.model_dir == Path.cwd() / "here" / "models" / "m"
    assert settings.cache_dir == Path.cwd() / "here" / "cache" / "graphs"


def test_links_of_certificates_stay_for_they_may_lead_elsewhere_later(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "now").symlink_to("old")
    settings = load_settings(GatewaySettings, tls_dir="now", home="now")
    assert settings.tls_dir == tmp_path / "now"
    assert settings.home == (tmp_path / "old").resolve()


def test_advertised_address() -> None:
    assert load_settings(DecodeWorkerSettings, listen="10.0.0.1:1").advertise == "10.0.0.1:1"
    everywhere = load_settings(CompileWorkerSettings, listen="0.0.0.0:7100")
    assert everywhere.advertise == f"{socket.gethostname()}:7100"


def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAST_COMPILE_ADDRESS", "")
    settings = load_settings(DecodeWorkerSettings)
    assert settings.compile_address is None
    assert rows(settings)["compile_address"] == ("", "default")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@cache:6379/0", "redis://user:***@cache:6379/0"),
        ("rediss://:secret@cache:6379", "rediss://:***@cache:6379"),
        ("redis://cache/0?password=secret&db=1", "redis://cache/0?password=***&db=1"),
        ("unix://u@/run/redis?PASSWORD=secret", "unix://u@/run/redis?PASSWORD=***"),
        ("redis://cache:6379/0", "redis://cache:6379/0"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    settings = load_settings(GatewaySettings, redis_url=url)
    assert settings.redis_url == url
    assert rows(settings)["redis_url"][0] == shown


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://cache:6379/0", "redis://:p%40ss%3A@cache:6379/0"),
        ("rediss://ann@cache?ssl_ca_certs=x", "rediss://ann:p%40ss%3A@cache?ssl_ca_certs=x"),
        ("unix:///run/redis?db=1", "unix://:p%40ss%3A@/run/redis?db=1"),
        ("redis://:p%40ss%3A@cache", "redis://:p%40ss%3A@cache"),
        (None, "redis://:p%40ss%3A@127.0.0.1:6379/0"),
    ],
)
def test_a_password_out_of_a_file(
    url: str | None, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("password").write_text("p@ss:\n")
    settings = load_settings(ServeSettings, redis_url=url, redis_password_file="password")
    assert settings.redis_url == whole
    assert "p%40ss" not in rows(settings)["redis_url"][0]
    # services that it starts read the file themselves, wherever they work
    stack = Stack(specs=(), redis_url=settings.redis_url, embedded_redis=False)
    for name, value in for_children(settings, stack).items():
        assert "p@ss" not in value and "p%40ss" not in value
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    assert load_settings(GatewaySettings).redis_url == whole


@pytest.mark.parametrize("content", [None, "", "\n", "two\nlines", b"\xff"])
def test_what_is_no_file_with_a_password(content: str | bytes | None) -> None:
    if content is not None:
        Path("password").write_bytes(content.encode() if isinstance(content, str) else content)
    assert "redis_password_file = " in refusal(GatewaySettings, redis_password_file="password")


def test_two_passwords_for_one_redis() -> None:
    Path("password").write_text("one")
    told = refusal(GatewaySettings, redis_url="redis://:other@h", redis_password_file="password")
    assert "redis_password_file" in told
    assert "other@" not in told


@pytest.mark.parametrize("url", ["rediz://user:secret@h/0", "rediz://h/0?password=secret"])
def test_a_password_is_not_in_errors(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(GatewaySettings, redis_url=url)
    assert "secret" not in str(error.value)
    assert "***" in str(error.value)


@pytest.mark.parametrize("cls", [DecodeWorkerSettings, ServeSettings])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"weight_dtype": "fp32", "quantization": "none"}, "fp32"),
        ({"weight_dtype": "bf16", "quantization": "none"}, "bf16"),
        ({"weight_dtype": "fp32", "quantization": "q4_1"}, "bf16"),
        ({"quantization": "int8", "kv_dtype": "int8"}, "int8"),
    ],
)
def test_the_cache_is_exact_where_the_weights_are(
    cls: type[CommonSettings], flags: dict[str, str], expected: str
) -> None:
    assert load_settings(cls, **flags).kv_dtype == expected


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting_says_what_it_is_for(kind: type[CommonSettings]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []

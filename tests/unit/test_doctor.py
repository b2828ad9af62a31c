"""``precast doctor``: what it finds, and what its exit code says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precast import doctor as findings_of
from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.models.importing.catalog import list_models
from precast.system.cpu import this_cpu
from precast.system.free_memory import FreeMemory
from tests.support.command import precast
from tests.support.machines import XEON_2X28, machine, topology_of
from tests.support.models import write_model

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, prefix: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    if not prefix:
        return precast("doctor", *arguments)
    command = [*prefix, sys.executable, "-m", "precast", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def findings(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(done.stdout)["findings"]}


def test_this_machine_can_serve(tmp_path: Path) -> None:
    model = write_model(tmp_path / "models" / "tiny")
    (tmp_path / "models" / "broken").mkdir()
    assert len(list_models(model.parent)) == 2
    nowhere = "redis://:secret@127.0.0.1:1/0"
    done = doctor("--json", f"--home={tmp_path}", f"--redis-url={nowhere}", "--model=tiny")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["serves"] is True
    found = findings(done)
    assert this_cpu().model in found["cpu"]["detail"]
    assert found["model tiny"]["state"] == "ok"
    assert "can't be served: " in found["model broken"]["detail"]
    assert found["redis"]["state"] == "warning"
    assert "secret" not in done.stdout
    assert float(found["memory bandwidth"]["detail"].split()[0]) > 0.1
    assert found["operator linear"] == {
        "name": "operator linear",
        "state": "ok",
        "detail": "native",
    }
    for name in ("memory", "huge pages", "shared memory", "torch", "compiler"):
        assert found[name]["detail"], name


def test_the_plan_for_this_machine(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "tiny")
    flags = ("--json", f"--home={tmp_path}", "--model=tiny", "--replicas=2", "--cores=0,1")
    found = findings(doctor(*flags))
    assert found["placement"]["detail"] == "cores = 0,1 was asked for: a thread for each"
    for index in range(2):
        detail = found[f"replica {index} rank 0"]["detail"]
        assert detail.startswith(f"1 thread on CPU {index}, node 0")
    assert found["kv memory"]["detail"].startswith("2 MiB for 8192 tokens, contexts of up to 256;")


def test_the_plan_for_another_machine(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "tiny")
    settings = load_settings(DecodeWorkerSettings, home=str(tmp_path), model="tiny", tp="2")
    free = FreeMemory(nbytes=1 << 40, why="all of it")
    rows = list(findings_of.planned(settings, machine(topology_of(XEON_2X28)), free))
    assert [(row.name, row.detail) for row in rows if row.name != "placement"] == [
        ("rank 0", "27 threads on CPUs 0-26, node 0"),
        ("rank 1", "27 threads on CPUs 28-54, node 1"),
        ("leader, gateway", "CPUs 27,55,83,111"),
        (
            "kv memory",
            "2 MiB for 8192 tokens, contexts of up to 256; 0 MiB are the weights'; all of it",
        ),
    ]
    assert "a thread for each core; one core is left to leader" in rows[0].detail


def test_one_rank_on_two_sockets_is_a_warning(tmp_path: Path) -> None:
    settings = load_settings(DecodeWorkerSettings, home=str(tmp_path), model="gone")
    free = FreeMemory(nbytes=1 << 40, why="all of it")
    rows = list(findings_of.planned(settings, machine(topology_of(XEON_2X28)), free))
    warnings = [row.detail for row in rows if row.state == "warning"]
    assert warnings[0].startswith("a rank spans 2 nodes: tp = 2 would keep")
    assert warnings[1].startswith("depends on the model: no model at ")


@pytest.mark.parametrize(
    ("flag", "name", "said"),
    [
        ("--kv-blocks=1000000000", "kv memory", "tiny does not fit: weights 0 MiB, KV cache"),
        ("--cores=4095", "placement", "cores: CPU 4095 is not one that this process may use"),
    ],
)
def test_a_plan_that_can_t_be(tmp_path: Path, flag: str, name: str, said: str) -> None:
    write_model(tmp_path / "models" / "tiny")
    done = doctor("--json", f"--home={tmp_path}", "--model=tiny", flag)
    assert done.returncode == 1
    assert findings(done)[name]["state"] == "problem"
    assert findings(done)[name]["detail"].startswith(said)


def test_redis_that_answers(tmp_path: Path, redis_url: str) -> None:
    settings = load_settings(DecodeWorkerSettings, home=str(tmp_path), redis_url=redis_url)
    assert findings_of._redis(settings).state == "ok"


def test_a_provider_that_is_not_there_has_a_reason(tmp_path: Path) -> None:
    done = doctor("--json", f"--home={tmp_path}", "--kernel-provider=sgl_kernel")
    assert done.returncode == 0
    for name in ("rms_norm", "linear"):
        found = findings(done)[f"operator {name}"]
        assert found["state"] == "warning"
        assert found["detail"].startswith("native (")


def test_a_machine_that_cannot_serve_says_so(tmp_path: Path) -> None:
    """A /dev/shm of 1 MiB is too small for two ranks."""
    mounted = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    prefix = ("unshare", "--mount", "--map-root-user", "sh", "-c", mounted, "sh")
    done = doctor(f"--home={tmp_path}", "--tp=2", prefix=prefix)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "this machine can't serve" in done.stdout
    assert "needs 5 MiB" in " ".join(done.stdout.split())


def test_missing_kernels_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_of, "_native_problem", lambda: "native kernels are not built")
    settings = load_settings(DecodeWorkerSettings, home=str(tmp_path))
    found = {finding.name: finding for finding in findings_of.examine(settings)}
    assert found["native kernels"].state == "problem"
    assert "memory bandwidth" not in found


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    done = doctor(f"--home={tmp_path}", "--kernel-provider=onednn")
    assert done.returncode == 2
    assert done.stderr.startswith("precast: kernel_provider = ")
    assert len(done.stderr.splitlines()) == 1

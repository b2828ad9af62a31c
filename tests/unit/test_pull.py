"""``precast models pull`` against a local server that speaks the hub's protocol."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from precast.cli import serve
from precast.cli.main import app
from precast.cli.view import open_view
from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, PrecastError, Unavailable
from precast.models.importing import hub as hubs
from precast.models.importing.adapters import list_adapters
from precast.models.importing.catalog import list_models
from precast.models.importing.hub import HubName, hub_name
from precast.models.importing.pull import DOWNLOADS, SOURCE, pull_adapter, pull_model
from tests.support.adapters import write_adapter
from tests.support.gguf_files import split_gguf, write_gguf
from tests.support.hub_server import COMMIT, Hub, hub_of, serving
from tests.support.models import write_model

REPO = HubName(repo="tiny-org/tiny", file=None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(hub_of(write_model(tmp_path / "source"))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def quiet(_stage: str) -> None:
    """Progress that nobody reads."""


def test_a_pulled_model_is_the_hubs_and_pinned(hub: Hub, tmp_path: Path) -> None:
    models, stages = tmp_path / "models", list[str]()
    info = pull_model(REPO, models, report=stages.append)
    assert (info.name, info.path) == ("tiny", models / "tiny")
    for path in info.path.iterdir():
        if path.name != SOURCE:
            assert path.read_bytes() == hub.files[path.name]
    assert json.loads((info.path / SOURCE).read_text())["commit"] == COMMIT
    assert not {"README.md", "onnx", ".cache"} & {path.name for path in info.path.iterdir()}
    assert "checking model.safetensors" in stages
    assert [model.name for model in list_models(models)] == ["tiny"]
    asked = len(hub.asked)
    assert pull_model(REPO, models, report=quiet) == info
    assert len(hub.asked) == asked, "what is there is not asked for"


def test_an_interrupted_pull_goes_on_where_it_was(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    size, hub.cut_at = len(hub.files["model.safetensors"]), 5000
    info = pull_model(REPO, tmp_path, report=quiet)
    assert (info.path / "model.safetensors").stat().st_size == size
    ranges = [asked[2] for asked in hub.asked if asked[:1] == ("GET",) and asked[2]]
    assert ranges == ["bytes=5000-"], "only what was missing came again"


def test_a_pull_that_was_killed_leaves_its_bytes_to_the_next(hub: Hub, tmp_path: Path) -> None:
    content, models = hub.files["model.safetensors"], tmp_path / "models"

    def killed(stage: str) -> None:
        if stage == "checking model.safetensors":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_model(REPO, models, report=killed)
    assert list_models(models) == []
    hub.asked.clear()
    pull_model(REPO, models, report=quiet)
    assert ("GET", f"/{hub.repo}/resolve/{COMMIT}/model.safetensors", None) not in hub.asked
    assert (models / "tiny" / "model.safetensors").read_bytes() == content
    assert not list((models / DOWNLOADS).rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_not_the_hubs_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.wrong.add(name)
    with pytest.raises(ModelCorrupt, match=f"{name} is not what the hub has"):
        pull_model(REPO, tmp_path, report=quiet)
    hub.wrong.clear()
    assert pull_model(REPO, tmp_path, report=quiet).name == "tiny"


def test_an_adapter_is_pulled_for_its_model(hub: Hub, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_model(models / "base")
    folder = write_adapter(tmp_path / "lora", models / "base", rank=3)
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.files["README.md"] = b"not needed"
    with pytest.raises(ConfigError, match="tiny is an adapter: pull it with --base, its model"):
        pull_model(REPO, models, report=quiet)
    info = pull_adapter(REPO, models, base="base", report=quiet)
    assert (info.name, info.base, info.rank) == ("tiny", "base", 3)
    assert list_adapters(models) == [info]
    asked = len(hub.asked)
    with pytest.raises(ConfigError, match="tiny is there already"):
        pull_adapter(REPO, models, base="base", report=quiet)
    assert len(hub.asked) == asked
    assert not list((models / DOWNLOADS).rglob("*.safetensors"))


def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    weights = hub.files.pop("model.safetensors")
    hub.files["model-1.safetensors"] = weights
    hub.files["consolidated.safetensors"] = weights
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    hub.files[hubs.INDEX] = json.dumps(index).encode()
    folder = pull_model(REPO, tmp_path, report=quiet).path
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model-1.safetensors"]
    index["weight_map"]["x"] = "../../etc/passwd"
    hub.files[hubs.INDEX] = json.dumps(index).encode()
    with pytest.raises(ModelNotFound, match=r"has no file '\.\./\.\./etc/passwd'"):
        pull_model(REPO, tmp_path, name="other", report=quiet)


def test_serve_pulls_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    view = open_view(Console(file=StringIO()), "http://x", "tiny")
    for _ in range(2):  # the second time it is there
        serve._import_model(hub.repo, tmp_path / "models", view)
    assert [model.name for model in list_models(tmp_path / "models")] == ["tiny"]
    assert len([asked for asked in hub.asked if asked[1].endswith("/model.safetensors")]) == 2


def test_a_name_that_another_model_has_is_kept(hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="comes from elsewhere"):
        pull_model(REPO, tmp_path, report=quiet)
    assert pull_model(REPO, tmp_path, name="other", report=quiet).name == "other"
    assert pull_model(REPO, tmp_path, replace=True, report=quiet).name == "tiny"
    assert (tmp_path / "tiny" / SOURCE).is_file()


def test_what_the_hub_lacks_is_one_line(hub: Hub, tmp_path: Path) -> None:
    def said(error: type[PrecastError], source: HubName, revision: str | None = None) -> str:
        with pytest.raises(error) as caught:
            pull_model(source, tmp_path, revision=revision, report=quiet)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such model" in said(ModelNotFound, HubName(repo="tiny-org/none", file=None))
    assert "no such revision" in said(ModelNotFound, REPO, "nowhere")
    assert "has no file 'x.gguf'" in said(ModelNotFound, HubName(repo=hub.repo, file="x.gguf"))
    del hub.files["model.safetensors"]
    assert "neither safetensors nor GGUF" in said(ConfigError, REPO)
    hub.files["tiny-Q4_0.gguf"] = b"GGUF"
    assert f"{hub.repo}/tiny-Q4_0.gguf" in said(ConfigError, REPO)


def test_a_hub_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="can't be reached"):
        pull_model(REPO, tmp_path, report=quiet)


def test_all_parts_of_a_file_are_pulled(hub: Hub, tmp_path: Path) -> None:
    parts = split_gguf(write_gguf(tmp_path / "small.gguf"), 2)
    hub.files |= {part.name: part.read_bytes() for part in parts}
    asked = HubName(repo=hub.repo, file=parts[1].name)
    info = pull_model(asked, tmp_path / "models", report=quiet)
    assert info.name == "small"
    assert len(list(info.path.glob("model-*.gguf"))) == 2
    del hub.files[parts[0].name]
    with pytest.raises(ModelNotFound, match="has no file 'small-00001-of-00002"):
        pull_model(asked, tmp_path / "models", name="again", report=quiet)


def test_the_command_pulls(hub: Hub, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["models", "pull", hub.repo, "--home", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "tiny: 0M parameters" in done.output
    done = CliRunner().invoke(app, ["models", "pull", "no-org", "--home", str(tmp_path)])
    assert done.exit_code != 0 and "expected org/name" in done.output


@pytest.mark.parametrize("text", ["name", "a/b/c", "../x/y", "/a/b", "a/b/../c.gguf", "a//b", ""])
def test_what_is_no_name_of_a_hub(text: str) -> None:
    assert hub_name(text) is None

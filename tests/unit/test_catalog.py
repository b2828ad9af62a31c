"""The catalog: what is a model, and what is said of those that are none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, UnsupportedArchitecture
from precast.models.importing.catalog import (
    BrokenModel,
    ModelInfo,
    check_model,
    find_model,
    list_models,
)
from tests.support.models import config, tensors, write_model


def test_describes_a_model(tmp_path: Path) -> None:
    info = check_model(write_model(tmp_path / "tiny"))
    assert (info.name, info.architecture, info.context_length) == ("tiny", "llama", 256)
    assert info.parameters == sum(tensor.size for tensor in tensors().values())
    assert info.size_bytes == sum(path.stat().st_size for path in info.path.iterdir())


def test_lists_good_and_broken_models_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "b-good")
    write_model(tmp_path / "a-broken").joinpath("tokenizer.json").unlink()
    (tmp_path / ".partial-x").mkdir()
    broken, good = list_models(tmp_path)
    assert isinstance(good, ModelInfo)
    assert isinstance(broken, BrokenModel)
    assert "tokenizer.json is missing" in broken.problem
    assert list_models(tmp_path / "none") == []


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_layer(folder: Path) -> None:
    kept = {name: t for name, t in tensors().items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors")


def break_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "part-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shrink_vocabulary(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config(vocab_size=100)))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "config.json").write_text(json.dumps(config(hidden_size=None))), "hidden_size"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
    (truncate, "model.safetensors"),
    (drop_layer, "model.layers.1.input_layernorm.weight is missing"),
    (break_index, "part-2.safetensors is missing"),
    (shrink_vocabulary, "vocab_size = 100"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_says_in_one_line_what_is_wrong(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = write_model(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(ModelCorrupt) as failure:
        check_model(folder)
    assert said in str(failure.value)
    assert "\n" not in str(failure.value)


def test_unsupported_architecture_names_those_supported(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedArchitecture, match=r"MambaForCausalLM .*LlamaForCausalLM"):
        check_model(folder)


def test_unknown_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model 'nope'"):
        find_model(tmp_path, "nope")
    for name in ("../etc", "", ".hidden", "a/b", "x" * 200):
        with pytest.raises(ConfigError):
            find_model(tmp_path, name)

"""The catalog: what is a model, and what is said of those that are none."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, UnsupportedArchitecture
from precast.models.importing import catalog
from precast.models.importing.catalog import (
    BrokenModel,
    ModelInfo,
    check_model,
    find_model,
    list_models,
)
from tests.support.models import VOCABULARY, config, tensors, write_model


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


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 538090408\n"
)


def test_folders_that_no_one_foresaw_are_listed_as_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, changes in (
        ("layers", {"num_hidden_layers": 10**9}),
        ("classes", {"architectures": [{}]}),
        ("rope", {"rope_theta": float("nan")}),
    ):
        folder = write_model(tmp_path / name)
        (folder / "config.json").write_text(json.dumps(config(**changes)))
    write_model(tmp_path / "good")
    write_model(tmp_path / "strange")
    real = catalog.load_config

    def strange(folder: Path) -> object:
        if folder.name == "strange":
            raise RuntimeError("two\nlines")
        return real(folder)

    monkeypatch.setattr(catalog, "load_config", strange)
    models = {model.name: model for model in list_models(tmp_path)}
    assert isinstance(models.pop("good"), ModelInfo)
    assert {"classes", "layers", "rope", "strange"} == set(models)
    for model in models.values():
        assert isinstance(model, BrokenModel)
        assert model.problem and "\n" not in model.problem


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "tiny")
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelCorrupt, match=rf"{name}: a Git LFS pointer .*git lfs pull"):
        check_model(folder)


def test_quantized_tensors_are_refused_by_name(tmp_path: Path) -> None:
    """Also where no config.json says that they are."""
    folder = write_model(tmp_path / "tiny")
    name = "model.layers.0.mlp.up_proj.weight"
    scaled = tensors() | {f"{name}_scale": np.ones((64, 1), np.float32)}
    save_file(scaled, folder / "model.safetensors")
    with pytest.raises(UnsupportedArchitecture, match=f"tensor {name}_scale"):
        check_model(folder)
    save_file(tensors() | {name: np.ones((64, 32), np.int8)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedArchitecture, match=f"{name} has type I8"):
        check_model(folder)


def test_tensors_that_checkpoints_have_for_no_use_are_let_be(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    extra = {
        "lm_head.weight": np.ones((VOCABULARY, 32), np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file(tensors() | extra, folder / "model.safetensors")
    assert check_model(folder).name == "tiny"


def other_shape(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config(intermediate_size=96)))


def drop_last(folder: Path) -> None:
    kept = {n: t for n, t in tensors().items() if n != "model.layers.1.mlp.down_proj.weight"}
    save_file(kept, folder / "model.safetensors")


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
    (drop_last, "model.layers.1.mlp.down_proj.weight is missing"),
    (other_shape, "mlp.gate_proj.weight has shape (64, 32), not (96, 32)"),
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

"""`precast models import FILE.gguf`: all that the file says, or one line that says why not."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import Result
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from typer.testing import CliRunner

from precast.cli.main import app
from precast.errors import UnsupportedArchitecture
from precast.models.config import load_config
from precast.models.gguf_index import read_index
from precast.models.importing.catalog import check_model
from precast.models.importing.gguf import weights
from precast.models.importing.gguf.convert import convert
from precast.models.rope import RopeConfig
from precast.models.weights.gguf_checkpoint import GgufCheckpoint
from precast.ops import native
from precast.ops.scaled import floats
from precast.tokenizer.load import load_tokenizer
from precast.tokenizer.model_tokenizer import read_model_tokenizer
from tests.support import models
from tests.support.gguf_files import (
    TEMPLATE,
    byte_level,
    gguf_tensors,
    hugging_face_tensors,
    quantized,
    write_gguf,
)

COUNT = len(byte_level()["tokenizer.ggml.tokens"])
SECONDS = 1.0
"""Of processor time, which other programs don't take from us."""


def run(path: Path, home: Path) -> Result:
    return CliRunner().invoke(app, ["models", "import", str(path), f"--home={home}"])


def converted(path: Path) -> Path:
    """In this process."""
    target = path.parent / "converted"
    target.mkdir()
    convert(path, target, lambda _stage: None)
    (target / "model.gguf").hardlink_to(path)
    return target


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All that the folder has, as floats."""
    source = GgufCheckpoint(folder)
    return {name: floats(source.get(name, t.shape)) for name, t in read_index(folder).items()}


def test_a_file_becomes_a_model(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    done = run(source, tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("tiny: ")
    folder = tmp_path / "models" / "tiny"
    expected = hugging_face_tensors(models.config(), COUNT)
    found = tensors_of(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], torch.from_numpy(tensor)), name
    config = load_config(folder)
    assert (config.num_layers, config.q_heads, config.kv_heads) == (2, 4, 2)
    assert config.eos_token_ids == (2,)
    assert config.tie_word_embeddings and config.rms_norm_eps == 1e-5
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_an_output_of_its_own(tmp_path: Path) -> None:
    folder = converted(write_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=False))
    expected = hugging_face_tensors(models.config(tie_word_embeddings=False), COUNT)
    found = tensors_of(folder)["lm_head.weight"]
    assert torch.equal(found, torch.from_numpy(expected["lm_head.weight"]))
    assert not load_config(folder).tie_word_embeddings


def test_two_imports_are_the_same(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        convert(source, folder, lambda _stage: None)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_only_the_files_own_tokenizer_counts(tmp_path: Path) -> None:
    """A folder may hold another model's files beside it."""
    source = write_gguf(tmp_path / "tiny.gguf")
    models.write_model(tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "chat_template.jinja").write_text("another")
    folder = converted(source)
    assert load_tokenizer(folder).get_vocab_size() == COUNT
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE


def test_a_template_for_tools_is_taken_along(tmp_path: Path) -> None:
    fields = {"tokenizer.chat_template.tool_use": "for tools"}
    folder = converted(write_gguf(tmp_path / "tiny.gguf", fields=fields))
    assert read_model_tokenizer(folder).template(tools=True).source == "for tools"
    assert read_model_tokenizer(folder).template(tools=False).source == TEMPLATE


def biased_tensors(**changes: Any) -> dict[str, Any]:
    """By Hugging Face's names, with MLP biases, which the tiny models have not."""
    plain = hugging_face_tensors(models.config(attention_bias=True, **changes), COUNT)
    rng = np.random.default_rng(11)
    for name in [name for name in plain if ".mlp." in name]:
        bias = rng.normal(0, 1, plain[name].shape[0]).astype(np.float32)
        plain[name.replace("weight", "bias")] = bias
    return plain


def test_biases_are_used(tmp_path: Path) -> None:
    expected = biased_tensors()
    mlp = {
        f"blk.{index}.ffn_{part}.bias": expected[f"model.layers.{index}.mlp.{part}_proj.bias"]
        for index in range(models.LAYERS)
        for part in ("gate", "up", "down")
    }
    source = write_gguf(tmp_path / "tiny.gguf", attention_bias=True, tensors=mlp)
    folder = converted(source)
    found = tensors_of(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], torch.from_numpy(tensor)), name
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] and config["mlp_bias"]


def test_an_output_without_a_bias_has_a_bias_of_zeros(tmp_path: Path) -> None:
    none = {f"blk.{index}.attn_output.bias": None for index in range(models.LAYERS)}
    folder = converted(write_gguf(tmp_path / "tiny.gguf", attention_bias=True, tensors=none))
    found = tensors_of(folder)
    for index in range(models.LAYERS):
        assert not found[f"model.layers.{index}.self_attn.o_proj.bias"].any()
        assert found[f"model.layers.{index}.self_attn.q_proj.bias"].any()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"type": "none"}, {}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
        (
            {"type": "yarn", "factor": 8.0, "yarn_beta_fast": 16.0, "attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 16.0,
                "attention_factor": 0.5 * (1 + 0.1 * np.log(8.0)),
            },
        ),
    ],
)
def test_scaling_of_the_rope_is_used(
    tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    given = {f"llama.rope.scaling.{name}": value for name, value in fields.items()}
    folder = converted(write_gguf(tmp_path / "tiny.gguf", fields=given))
    [rope] = load_config(folder).ropes
    wanted = RopeConfig(rope_theta=10000.0, **expected)
    assert rope.inverse_frequencies(8) == wanted.inverse_frequencies(8)
    assert rope.amplitude() == pytest.approx(wanted.amplitude())


def test_llama_3s_factors_are_used(tmp_path: Path) -> None:
    rope = RopeConfig(rope_theta=5e5, rope_type="llama3", factor=32.0)
    plain = RopeConfig(rope_theta=5e5).inverse_frequencies(128)
    factors = np.array(plain) / np.array(rope.inverse_frequencies(128))
    sizes = {"head_dim": 128, "rope_theta": 5e5}
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tensors={"rope_freqs.weight": factors.astype(np.float32)},
        fields={"llama.attention.key_length": 128, "llama.attention.value_length": 128},
        **sizes,
    )
    [read] = load_config(converted(path)).ropes
    assert read.inverse_frequencies(128) == pytest.approx(rope.inverse_frequencies(128), rel=1e-6)
    assert read.rope_type == "llama3"


@pytest.mark.parametrize(
    "kind",
    [
        Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0,
        Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4,
    ],
)  # fmt: skip
def test_each_type_is_read_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type
) -> None:
    """Rows of 256, which K-quants need; in pieces of three rows."""
    monkeypatch.setattr(weights, "_CHUNK", 3 * 256)
    native.start_threads((-1, -1))
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    plain = gguf_tensors(models.config(**sizes), COUNT)
    types = dict.fromkeys((n for n, t in plain.items() if t.ndim == 2), kind)
    path = write_gguf(tmp_path / "tiny.gguf", types=types, **sizes)
    found = tensors_of(converted(path))
    raw = quantized(plain["token_embd.weight"], kind)
    expected = gguf.quants.dequantize(raw, kind)
    table = found["model.embed_tokens.weight"]
    assert torch.equal(table.float(), torch.from_numpy(np.array(expected)))


def test_an_embedding_may_have_more_rows_than_there_are_tokens(tmp_path: Path) -> None:
    table = np.random.default_rng(3).normal(0, 1, (COUNT + 8, 32)).astype(np.float32)
    folder = converted(write_gguf(tmp_path / "x.gguf", tensors={"token_embd.weight": table}))
    assert load_config(folder).vocab_size == COUNT + 8
    assert check_model(folder).parameters > 0
    found = tensors_of(folder)["model.embed_tokens.weight"]
    assert torch.equal(found, torch.from_numpy(table))


def drop(name: str) -> dict[str, Any]:
    return {"tensors": {name: None}}


ONES = np.ones((32, 32), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor is missing": (drop("blk.0.ffn_up.weight"), "tensor blk.0.ffn_up.weight is missing"),
    "the last norm is missing": (
        drop("output_norm.weight"),
        "tensor output_norm.weight is missing",
    ),
    "a layer has no bias": (
        {"attention_bias": True, "tensors": {"blk.1.attn_k.bias": None}},
        "tensor blk.1.attn_k.bias is missing",
    ),
    "the first file of a split": (
        {"fields": {"split.no": 0, "split.count": 3}, **drop("blk.1.ffn_up.weight")},
        "by its header part 1 of 3, by its name part 1 of 1",
    ),
    "experts that are not there": (
        {"fields": {"llama.expert_count": 2**31 - 1, "llama.expert_used_count": 2}},
        "tensor blk.0.ffn_gate_inp.weight is missing",
    ),
    "experts without a word": (
        {"tensors": {"blk.0.ffn_gate_inp.weight": ONES}},
        "tensor 'blk.0.ffn_gate_inp.weight' is not one of a llama model's",
    ),
    "a key that nothing reads": (
        {"fields": {"llama.attention.sliding_window": 16}},
        "llama.attention.sliding_window = 16 is not supported",
    ),
    "a token of 9000 characters": (
        {"fields": {"tokenizer.ggml.tokens": ["a" * 9000]}},
        "a token of 9000 characters",
    ),
    "longrope": ({"fields": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not one of"),
    "a key of the rope that nothing reads": (
        {"fields": {"llama.rope.scaling.yarn_log_multiplier": 0.1}},
        "yarn_log_multiplier is not supported",
    ),
    "factors that are not Llama 3's": (
        {"tensors": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}},
        "rope_freqs.weight is not Llama 3's scaling",
    ),
    "another architecture": ({"fields": {"general.architecture": "mamba"}}, "mamba is not one"),
    "an adapter": ({"fields": {"general.type": "adapter"}}, "'adapter', not a model"),
    "a rotation of a part": (
        {"fields": {"llama.rope.dimension_count": 4}},
        "llama.rope.dimension_count = 4 is not supported",
    ),
    "big-endian": ({"big_endian": True}, "big-endian"),
    "no merges": (
        {"fields": {"tokenizer.ggml.merges": None}},
        "tokenizer.ggml.merges is missing",
    ),
    "more tokens than rows": (
        {"tensors": {"token_embd.weight": np.ones((COUNT - 1, 32), np.float32)}},
        f"the vocabulary has {COUNT} tokens, its embedding {COUNT - 1} rows",
    ),
    "another shape": (
        {"tensors": {"blk.1.attn_q.weight": ONES[:16]}},
        "tensor blk.1.attn_q.weight has shape (16, 32), not (32, 32)",
    ),
    "weights that are no numbers": (
        {"tensors": {"blk.1.attn_q.weight": ONES * np.float32("nan")}},
        "tensor blk.1.attn_q.weight has values that are not finite",
    ),
    "a type that can't be read": (
        {"tensors": {"blk.1.attn_q.weight": ONES.astype(np.int8)}},
        "tensor blk.1.attn_q.weight has type I8, which can't be read",
    ),
    "too many layers": ({"fields": {"llama.block_count": 1000}}, "llama.block_count = 1000, more"),
    "a rope that is no number": (
        {"fields": {"llama.rope.freq_base": float("nan")}},
        "rope_theta",
    ),
    "heads that don't divide": (
        {"fields": {"llama.attention.head_count_kv": 3}},
        "tensor blk.0.attn_k.weight has shape",
    ),
    "a size of another type": (
        {"fields": {"llama.embedding_length": "many"}},
        "llama.embedding_length is not an integer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line(tmp_path: Path, case: str) -> None:
    changes, said = REFUSED[case]
    source = write_gguf(tmp_path / "tiny.gguf", **changes)
    started = time.process_time()
    done = run(source, tmp_path)
    assert time.process_time() - started < SECONDS
    refused(done, tmp_path, said)


def refused(done: Result, home: Path, said: str) -> None:
    assert done.exit_code in (1, 2), done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("precast: ")]
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (home / "models").iterdir() if path.is_dir()]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def point(path: Path) -> None:
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 98362432\n"
    )


def claim(path: Path) -> None:
    """A string longer than the file."""
    data = bytearray(path.read_bytes())
    data[24:32] = (2**63).to_bytes(8, "little")
    path.write_bytes(data)


def overlap(path: Path) -> None:
    """The last tensor begins where another one does."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b".weight") + 7 + 4 + 16 + 4
    data[at : at + 8] = (0).to_bytes(8, "little")
    path.write_bytes(data)


def claim_tensors(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:16] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut, "not a readable GGUF file: it is cut off"),
    (cut_header, "within its header"),
    (point, "a Git LFS pointer"),
    (claim, "a string of 9223372036854775808 bytes"),
    (claim_tensors, "not a readable GGUF file"),
    (overlap, "overlap"),
    (lambda path: path.write_bytes(b"") and None, "it has 0 bytes"),
    (lambda path: path.write_bytes(b"GGML" + bytes(90)) and None, "it begins with b'GGML'"),
    (lambda path: path.write_bytes(b"GGUF\x09" + bytes(90)) and None, "version 9"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    damage(source)
    refused(run(source, tmp_path), tmp_path, said)


def test_another_architecture_is_refused_before_its_vocabulary_is_read(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "x.gguf", fields={"general.architecture": "mamba"})
    data = source.read_bytes()
    source.write_bytes(data[: data.index(b"tokenizer.ggml.tokens")])
    with pytest.raises(
        UnsupportedArchitecture, match="architecture mamba is not one of: exaone4, gemma3, glm4"
    ):
        convert(source, tmp_path, lambda _stage: None)

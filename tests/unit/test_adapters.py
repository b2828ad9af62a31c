"""LoRA adapters: the operator, whole models against merged weights, refusals, keys."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precast.config.settings import DecodeWorkerSettings, ServeSettings, load_settings
from precast.errors import ConfigError, InvalidRequest
from precast.graphs.factors import shape_from
from precast.graphs.key import parse_spec
from precast.models.config import load_config
from precast.models.layers import AttentionWeights
from precast.models.load import load_weights
from precast.models.precision import Precision
from precast.models.shape import MAX_ADAPTER_RANK, shape_of
from precast.models.sharding import shard
from precast.models.weights.adapter_folder import read_adapter, shape_of_adapters
from precast.models.weights.adapters import ADAPTER_DTYPE, AdapterFolders
from precast.models.weights.size import adapter_bytes
from precast.ops import native, providers
from precast.ops.packing import Format, pack
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from tests.support.adapters import mixed, write_adapter, write_merged
from tests.support.architectures import (
    POSITIONS,
    forward,
    load,
    reference,
    write_model,
)

BOUND = 1e-4
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Phi-3's."""
MODULE = "model.layers.0.self_attn.q_proj"
adapted_linear = torch.ops.precast.adapted_linear


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rank", "inputs", "widths", "rows"),
    [
        (5, 50, [33, 7, 24], 37),
        (8, 576, [576, 192, 192], 7),
        (16, 1536, [576], 12),
        (16, 1536, [576], 70),
        (3, 300, [40], 3),
    ],
)
def test_rows_get_what_their_own_adapter_adds_and_others_keep_their_bits(
    rank: int, inputs: int, widths: list[int], rows: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    native.start_threads((-1,) * threads)
    n, count = sum(widths), 3
    x = torch.randn(rows, inputs, generator=generator)
    weight = pack(torch.randn(n, inputs, generator=generator), Format.Q4_0)
    a = torch.randn(count, inputs, len(widths) * rank, generator=generator) * inputs**-0.5
    b = torch.randn(count, rank, n, generator=generator).half()
    a = a.half()
    slots = torch.randint(count + 1, (rows + 5,), generator=generator).int()
    slots[0], slots[1] = 0, count
    y, added = torch.ops.precast.linear(x, weight, None, n, int(Format.Q4_0)), []
    for row in range(rows):
        which = slots[row] - 1
        hidden = (x[row].double() @ a[which].double()).split(rank)
        parts = b[which].double().split(widths, -1)
        added.append(torch.cat([h @ part for h, part in zip(hidden, parts, strict=True)]))
    out = adapted_linear(x, weight, None, slots, a, b, widths, int(Format.Q4_0))
    none = slots[:rows] == 0
    assert torch.equal(out[none], y[none])
    expected = y.double() + torch.stack(added)
    assert error(out[~none].double(), expected[~none]) < 1e-5
    native.start_threads((-1,))
    for row in range(rows):  # whatever else is in the step, and however many threads there are
        one = slice(row, row + 1)
        alone = adapted_linear(x[one], weight, None, slots[one], a, b, widths, int(Format.Q4_0))
        assert torch.equal(alone[0], out[row])


def test_whoever_serves_linears_serves_adapted_ones() -> None:
    """Weights are packed for the provider, whose result is added to."""
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(size, 64, generator=generator) for size in (3, 32))
    a, b = (torch.randn(1, *size, generator=generator).half() for size in ((64, 4), (4, 32)))
    slots = torch.tensor([1, 0, 1], dtype=torch.int32)
    packed = pack(weight, Format.FP32)
    plain = adapted_linear(x, packed, None, slots, a, b, [32], int(Format.FP32))

    before = providers.active()
    kernels = {"linear": lambda x, w, bias, n, fmt: (x @ weight.T) * 2}
    providers.start(replace(before, wanted="other", kernels=kernels))
    try:
        other = adapted_linear(x, packed, None, slots, a, b, [32], int(Format.FP32))
    finally:
        providers.start(before)
    assert torch.allclose(other - plain, x @ weight.T, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slots": torch.tensor([0, 4], dtype=torch.int32)}, "there is no adapter 4"),
        ({"slots": torch.tensor([0, -1], dtype=torch.int32)}, "there is no adapter -1"),
        ({"slots": torch.zeros(1, dtype=torch.int32)}, "slots must be int32, one for each row"),
        ({"b": torch.zeros(3, 2, 5).half()}, "don't go together"),
        ({"a": torch.zeros(3, 9, 2).half()}, "differ in their sizes"),
        ({"a": torch.zeros(3, 8, 2)}, "a must be contiguous float16"),
    ],
)
def test_wrong_tensors_are_refused(change: dict[str, Tensor], said: str) -> None:
    good = {
        "x": torch.zeros(2, 8),
        "weight": pack(torch.zeros(6, 8), Format.FP32),
        "bias": None,
        "slots": torch.zeros(2, dtype=torch.int32),
        "a": torch.zeros(3, 8, 2).half(),
        "b": torch.zeros(3, 2, 6).half(),
    }
    with pytest.raises(RuntimeError, match=said):
        adapted_linear(*(good | change).values(), [6], int(Format.FP32))


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama_biases", ALL, ("q_proj", "v_proj")),
        ("phi3", FUSED, ("o_proj",)),
        ("glm4", ("q_proj", "k_proj", "gate_up_proj"), ("down_proj",)),
        ("gemma3", ALL, ("up_proj",)),
        ("mixtral", ("q_proj", "o_proj"), ("k_proj",)),
    ],
)
def test_each_sequence_of_a_batch_has_its_own_adapter(
    name: str, first: tuple[str, ...], second: tuple[str, ...], tmp_path: Path
) -> None:
    """As transformers computes it with the adapter merged into the weights."""
    model = write_model(tmp_path / "model", name)
    folders = [
        write_adapter(tmp_path / "first", model, rank=4, targets=first, seed=1),
        write_adapter(tmp_path / "second", model, rank=3, targets=second, seed=2),
    ]
    merged = [write_merged(tmp_path / f"merged-{folder.name}", model, folder) for folder in folders]
    ours = forward(mixed(model, folders))
    assert torch.equal(ours[0], forward(load(model))[0])
    for number, folder in enumerate(merged, 1):
        theirs = reference(folder)[number]
        assert error(ours[number], theirs) < BOUND
        assert error(ours[number], reference(model)[number]) > 100 * BOUND  # it does something


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e7])
def test_values_keep_their_digits_in_16_bits(size: float, tmp_path: Path) -> None:
    """Whatever their size: A's factor is taken from B. They were stored in bfloat16 here, and none
    changes."""
    model = write_model(tmp_path / "model", "llama")
    folder = write_adapter(tmp_path / "one", model, targets=("q_proj",))
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(4)
    stored = {
        name: (torch.rand(x.shape, generator=generator) + 0.1).bfloat16() * factor
        for name, x in load_file(path).items()
        for factor in [size if "lora_A" in name else 0.5]
    }
    save_file(stored, path)
    config = load_config(model)
    adapter = read_adapter("one", folder, config)
    pair = AdapterFolders([adapter]).get(0, MODULE, 0, 0)
    assert pair is not None
    a, b = (x.to(ADAPTER_DTYPE).double() for x in pair)
    wanted = [stored[f"base_model.model.{MODULE}.lora_{side}.weight"].double() for side in "BA"]
    assert torch.equal(b @ a, wanted[0] * adapter.scale(MODULE) @ wanted[1])


def test_values_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    folder = write_adapter(tmp_path / "one", model, targets=("q_proj",))
    tensor(lambda found: found.update({k: x * 0 + 1e12 for k, x in found.items()}))(folder)
    adapter = read_adapter("one", folder, load_config(model))
    with pytest.raises(ConfigError, match=f"adapter one: values of {MODULE} are beyond 16 bits"):
        AdapterFolders([adapter]).get(0, MODULE, 0, 0)


def test_two_ranks_hold_what_one_does(tmp_path: Path) -> None:
    """Rows of B where a linear's rows are cut, columns of A where its columns are."""
    model = write_model(tmp_path / "model", "llama")
    folder = write_adapter(tmp_path / "one", model, targets=ALL)
    config = load_config(model)
    adapter = read_adapter("one", folder, config)

    def attention(rank: int, tp: int) -> AttentionWeights:
        part = shard(config, rank, tp)
        shape = shape_of(config, part, Precision(), shape_of_adapters([adapter]))
        source = AdapterFolders([adapter])
        loaded = load_weights(model, config, part, shape, POSITIONS, adapters=source)
        weights: AttentionWeights = loaded.layers[1].attention
        return weights

    whole, halves = attention(0, 1), [attention(rank, 2) for rank in range(2)]
    a, b = whole.output[-2:]
    assert torch.equal(torch.cat([half.output[-2] for half in halves], 1), a)
    assert all(torch.equal(half.output[-1], b) for half in halves)
    assert all(torch.equal(half.qkv[-2], whole.qkv[-2]) for half in halves)
    dim, q = config.head_dim, config.q_heads * config.head_dim
    queries = [
        half.qkv[-1][:, :, : len(shard(config, r, 2).q_heads) * dim]
        for r, half in enumerate(halves)
    ]
    assert torch.equal(torch.cat(queries, -1), whole.qkv[-1][:, :, :q])


def test_graphs_depend_on_rank_and_targets_and_on_nothing_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")

    def factors(*adapters: Path) -> dict[str, str]:
        made = mixed(model, adapters)
        assert shape_from(made.factors | {"num_tokens": "1"}) == made.shape
        parse_spec(made.factors | {"num_tokens": "1"})
        return made.factors

    def adapter(name: str, **options: Any) -> Path:
        return write_adapter(tmp_path / name, model, **options)

    one = factors(adapter("a", seed=1))
    assert factors(adapter("b", seed=2), adapter("c", seed=3)) == one
    assert factors(adapter("d", rank=2), tmp_path / "a") == one
    larger, other = factors(adapter("e", rank=5)), factors(adapter("f", targets=("q_proj",)))
    plain = load(model).factors
    for changed in (larger, other, plain):
        differ = {name for name in one if changed[name] != one[name]}
        assert differ == {"options"}
    assert "adapter" not in plain["options"]


@pytest.mark.parametrize(
    "text",
    [
        '{"adapter_rank":0,"adapter_targets":["qkv"]}',
        '{"adapter_rank":4,"adapter_targets":["qkv","down"]}',
        '{"adapter_rank":4,"adapter_targets":[]}',
        '{"adapter_rank":4,"adapter_targets":["head"]}',
        '{"adapter_rank":4}',
        "[]",
    ],
)
def test_wrong_factors_are_refused(text: str, tmp_path: Path) -> None:
    factors = load(write_model(tmp_path / "model", "llama")).factors
    with pytest.raises(InvalidRequest, match="options"):
        shape_from(factors | {"options": text})


def no_change(folder: Path) -> None:
    """Nothing."""


def tensor(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def damaged(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x10" * 64)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ({"use_dora": True}, no_change, "use_dora = True can't be served"),
        ({"bias": "all"}, no_change, "bias = all can't be served"),
        ({"init_lora_weights": "pissa"}, no_change, "init_lora_weights = pissa can't be served"),
        ({"lora_alpha": 10**400}, no_change, "one"),
        ({"modules_to_save": ["lm_head"]}, no_change, r"modules_to_save = \['lm_head'\] can't"),
        ({"peft_type": "IA3"}, no_change, "peft_type 'IA3' is not LORA"),
        ({"lora_alpha": "six"}, no_change, "lora_alpha = six is no number"),
        (
            {},
            tensor(lambda found: found.update({"lm_head.lora_A.weight": torch.zeros(4, 96)})),
            "tensor lm_head.lora_A.weight changes nothing that can be adapted",
        ),
        (
            {},
            tensor(lambda found: found.update({FIRST: torch.zeros(4, 95)})),
            r"q_proj has A \[4, 95\] and B \[96, 4\], where the model has \[96, 96\]",
        ),
        ({}, tensor(lambda found: found.__delitem__(FIRST)), "q_proj has A"),
        ({}, tensor(lambda found: found.clear()), "it has no tensors"),
        ({}, damaged, "adapter one: "),
        ({}, lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
        ({}, lambda folder: (folder / "adapter_config.json").unlink(), "is missing"),
        ({}, lambda folder: (folder / "adapter_config.json").write_text("[1"), "adapter one: "),
    ],
)
def test_what_can_t_be_served_is_refused_in_one_line(
    config: dict[str, Any], change: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", "llama")
    folder = write_adapter(tmp_path / "one", model, **config)
    change(folder)
    with pytest.raises(ConfigError, match=said) as refused:
        read_adapter("one", folder, load_config(model))
    assert "\n" not in str(refused.value)


def test_the_rank_is_bounded(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    folder = write_adapter(tmp_path / "one", model, rank=MAX_ADAPTER_RANK + 1, targets=("q_proj",))
    with pytest.raises(ConfigError, match=r"rank 257 of .* is above 256"):
        read_adapter("one", folder, load_config(model))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=", "'a=' must be name=folder, or the name of one that was imported"),
        ("a/b", "'a/b' must be name=folder"),
        ("a/b=/x", "'a/b=/x' must be name=folder"),
        ("a,a=/y", "two models are called a"),
        ("a=/x,a=/y", "two models are called a"),
        ("m=/x", "two models are called m"),
        (",".join(f"a{number}=/x" for number in range(65)), "more than 64 adapters"),
    ],
)
def test_settings_name_each_once(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(DecodeWorkerSettings, model="m", adapter=text)


def test_settings_that_adapters_do_not_allow() -> None:
    with pytest.raises(ConfigError, match="prefill_chunk = 8192: a step with adapters has at most"):
        load_settings(DecodeWorkerSettings, model="m", adapter="a=/x", prefill_chunk=8192)
    with pytest.raises(ConfigError, match="two models are called b"):
        load_settings(ServeSettings, model="m", more_models="b", adapter="b=/x")


def test_their_memory_is_known_before(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    folders = [
        write_adapter(tmp_path / str(rank), model, rank=rank, targets=ALL) for rank in (3, 8)
    ]
    config = load_config(model)
    found = [read_adapter(folder.name, folder, config) for folder in folders]
    leaves: list[Tensor] = tree_leaves(mixed(model, folders).weights.layers)
    held = sum(leaf.nbytes for leaf in leaves if leaf.dim() == 3)
    assert adapter_bytes(config, found) == held


def test_scales_are_alpha_by_the_rank_or_by_its_root(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    module = "model.layers.0.self_attn.q_proj"
    scales = [
        read_adapter(
            name, write_adapter(tmp_path / name, model, use_rslora=root), load_config(model)
        ).scale(module)
        for name, root in (("plain", False), ("root", True))
    ]
    assert scales == [6.0 / 4, 6.0 / 2]


def test_sequences_of_different_adapters_share_no_blocks() -> None:
    def key(adapter: int, salt: str = "") -> bytes:
        sequence = Sequence(
            request_id="r",
            prompt=list(range(32)),
            sampling=SamplingSpec(),
            max_tokens=1,
            stop_token_ids=frozenset(),
            adapter=adapter,
            cache_salt=salt,
        )
        return sequence.block_key(0, 16)

    keys = [key(0), key(1), key(2), key(0, "s"), key(1, "s")]
    assert len(set(keys)) == len(keys)
    assert key(1) == key(1)

"""Tiny models of every architecture, as transformers makes and runs them.

``main`` with OUT SEGMENT RANK TP FOLDER... runs each folder's model on ``SEQUENCES`` as one rank of
a group and writes the logits to ``OUT``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from precast.graphs.factors import rank_factors
from precast.models.config import load_config
from precast.models.forward import gathered, hidden_states, logits
from precast.models.kv_cache import LayerCache, new_cache
from precast.models.layers import Paging, Shape
from precast.models.load import Weights, load_weights
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.ops import native

VOCABULARY = 160
POSITIONS = 128
BLOCK_SIZE = 16
BLOCKS = POSITIONS // BLOCK_SIZE
"""Of a sequence."""
WINDOW = 12
FP32 = Precision()
Step = Callable[[Tensor, Tensor, Paging], Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}


def _sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in (3, 21, 45)]


SEQUENCES = _sequences()


def _config(name: str, **changes: Any) -> Any:
    import transformers

    plain = SIZES | {"rope_parameters": dict(ROPE)}  # some write to it
    return getattr(transformers, f"{name}Config")(**plain | changes)


def _longrope(original: int) -> Any:
    """Phi-4-mini's: a part of each head is rotated."""
    factors = {"short_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0], "long_factor": [3.0] * 3 + [9.0] * 3}
    scaled = {**ROPE, "rope_type": "longrope", "partial_rotary_factor": 0.75, **factors}
    return _config(
        "Phi3",
        original_max_position_embeddings=original,
        rope_parameters={**scaled, "original_max_position_embeddings": original},
        tie_word_embeddings=True,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("Llama", tie_word_embeddings=True),
    "llama_biases": lambda: _config(
        "Llama",
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0},
    ),
    "llama_llama3": lambda: _config(
        "Llama",
        rope_parameters={
            **ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_yarn": lambda: _config(
        "Llama",
        rope_parameters={
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "granite": lambda: _config(
        "Granite",
        attention_bias=True,
        embedding_multiplier=3.0,
        attention_multiplier=0.4,
        residual_multiplier=0.3,
        logits_scaling=5.0,
    ),
    "olmo2": lambda: _config("Olmo2"),
    "glm4": lambda: _config("Glm4", partial_rotary_factor=0.5, attention_bias=True),
    "glm": lambda: _config("Glm", partial_rotary_factor=0.5, attention_bias=True),
    "exaone4": lambda: _config("Exaone4", sliding_window=None, layer_types=["full_attention"] * 3),
    "exaone4_full": lambda: _config(
        "Exaone4", sliding_window=WINDOW, layer_types=["full_attention"] * 3
    ),
    "exaone4_window": lambda: _config("Exaone4", sliding_window=WINDOW, sliding_window_pattern=3),
    "mistral": lambda: _config("Mistral", sliding_window=None),
    "mistral_window": lambda: _config("Mistral", sliding_window=WINDOW),
    "mixtral": lambda: _config("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "gpt_oss": lambda: _config(
        "GptOss",
        num_local_experts=5,
        num_experts_per_tok=3,
        intermediate_size=64,
        sliding_window=WINDOW,
        swiglu_limit=1.5,
        rope_parameters={
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": lambda: _config("Qwen2"),
    "qwen2_window": lambda: _config(
        "Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen2_moe": lambda: _config(
        "Qwen2Moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        decoder_sparse_step=1,
        mlp_only_layers=[1],
    ),
    "qwen3": lambda: _config("Qwen3", head_dim=32),
    "qwen3_biases": lambda: _config("Qwen3", attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": lambda: _config(
        "Qwen3Moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[1],
    ),
    "qwen3_moe_window": lambda: _config(
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "gemma3": lambda: _config(
        "Gemma3Text",
        architectures=["Gemma3ForCausalLM"],
        tie_word_embeddings=True,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": ROPE,
        },
    ),
    "phi3": lambda: _config("Phi3", sliding_window=WINDOW),
    "phi3_partial": lambda: _config("Phi3", rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
    "phi3_long": lambda: _longrope(2),
    "phi3_short": lambda: _longrope(POSITIONS),
    "smollm3": lambda: _config("SmolLM3", no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
}
"""By name: the architecture, or that and what is special."""


def write_model(folder: Path, name: str, *, positions: int = POSITIONS) -> Path:
    """A random model as a Hugging Face folder of several weight files."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = CONFIGS[name]()
    config.max_position_embeddings = positions
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _randomize(parameter_name, parameter)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def _randomize(name: str, parameter: Tensor) -> None:
    """Values that make every tensor count; transformers' own leave biases zero."""
    if parameter.dim() > 1:
        parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    elif name.endswith("bias"):
        parameter.normal_(0, 0.3)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.3)


def reference(folder: Path) -> list[Tensor]:
    """transformers' logits [length, vocabulary] of each sequence, by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return [model(sequence[None]).logits[0] for sequence in SEQUENCES]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One rank's model, with a cache for every sequence."""

    shape: Shape
    weights: Weights
    caches: list[LayerCache]
    factors: dict[str, str]
    window_paging: Callable[[Paging], Paging] = lambda paging: paging
    """Of layers that attend to a window, out of the others'."""

    def eager(self, tokens: Tensor, positions: Tensor, paging: Paging) -> Tensor:
        windows = self.window_paging(paging)
        hidden = hidden_states(
            self.shape, self.weights, self.caches, tokens, positions, paging, windows
        )
        return gathered(self.shape, logits(self.shape, self.weights, hidden))


def load(folder: Path, rank: int = 0, tp: int = 1, *, precision: Precision = FP32) -> Loaded:
    config = load_config(folder)
    part = shard(config, rank, tp)
    shape = shape_of(config, part, precision)
    cache = {
        "blocks": BLOCKS * len(SEQUENCES),
        "kv_heads": shape.kv_heads,
        "block_size": BLOCK_SIZE,
        "head_dim": shape.head_dim,
    }
    return Loaded(
        shape=shape,
        weights=load_weights(folder, config, part, shape, POSITIONS),
        caches=[new_cache("fp32", **cache) for _ in config.layers],
        factors=rank_factors(shape, block_size=BLOCK_SIZE, torch_version=str(torch.__version__)),
    )


def forward(model: Loaded, decode: Step | None = None) -> list[Tensor]:
    """Logits of each sequence: all in one batch, prompts in chunks, then token by token.

    ``decode`` runs the steps that have one token a sequence; eager if it is None.
    """
    results: list[list[Tensor]] = [[] for _ in SEQUENCES]
    with torch.inference_mode():
        for ranges in _steps([len(sequence) for sequence in SEQUENCES]):
            sizes = [len(part) for _, part in ranges]
            tokens = torch.cat([SEQUENCES[index][part.start : part.stop] for index, part in ranges])
            positions = torch.cat([torch.arange(part.start, part.stop) for _, part in ranges])
            step = decode if decode and max(sizes) == 1 else model.eager
            rows = step(tokens, positions, _paging(ranges)).split(sizes)
            for (index, _), row in zip(ranges, rows, strict=True):
                results[index].append(row)
    return [torch.cat(rows) for rows in results]


def _steps(lengths: list[int]) -> list[list[tuple[int, range]]]:
    """For each step, the sequences that take part and their tokens: chunks of up to 10, the last
    four tokens one by one."""
    steps: list[list[tuple[int, range]]] = []
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        step = []
        for index, length in enumerate(lengths):
            size = min(10, max(1, length - 4 - done[index])) if done[index] < length else 0
            if size:
                step.append((index, range(done[index], done[index] + size)))
            done[index] += size
        steps.append(step)
    return steps


def _paging(ranges: list[tuple[int, range]]) -> Paging:
    """Each sequence's blocks lie backwards in its own part of the cache."""
    tables = [[(index + 1) * BLOCKS - 1 - i for i in range(BLOCKS)] for index, _ in ranges]
    slots = [
        table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for table, (_, part) in zip(tables, ranges, strict=True)
        for at in part
    ]
    starts = torch.tensor([0, *(len(part) for _, part in ranges)]).cumsum(0)
    return Paging(
        slots=torch.tensor(slots, dtype=torch.int32),
        query_starts=starts.to(torch.int32),
        context_lens=torch.tensor([part.stop for _, part in ranges], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
    )


def main(arguments: Sequence[str]) -> None:
    out, segment, rank, tp, *folders = arguments
    native.start_threads((-1,))
    native.join_group(segment, int(rank), int(tp), 60.0)
    results = {
        f"{Path(folder).name}.{index}": rows
        for folder in folders
        for index, rows in enumerate(forward(load(Path(folder), int(rank), int(tp))))
    }
    save_file(results, out)

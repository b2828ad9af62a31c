"""Tiny GGUF files of architecture "llama", whole or with whatever is wrong."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from tokenizers import pre_tokenizers

from tests.support import models

DATA = Path(__file__).parents[1] / "data"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<tool>",)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"

Array = "np.ndarray[Any, Any]"
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def byte_level() -> dict[str, Any]:
    """The tokenizer's fields of a small byte-level vocabulary: bytes, merged pieces, specials."""
    merges = json.loads((DATA / "gguf_vocabularies.json").read_text("utf-8"))["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *alphabet, *dict.fromkeys(m.replace(" ", "") for m in merges)]
    tokens += USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokens),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def sentencepiece() -> dict[str, Any]:
    """Of a small SentencePiece vocabulary: specials, bytes, pieces with scores."""
    pieces = json.loads((DATA / "gguf_vocabularies.json").read_text("utf-8"))["pieces"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += USER_DEFINED
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _types(tokens: Sequence[str]) -> list[int]:
    return [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens]


def write_gguf(
    path: Path,
    *,
    vocabulary: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    big_endian: bool = False,
    **changes: Any,
) -> Path:
    """``fields`` and ``tensors`` are put over what is there, None removes; ``types`` by GGUF's
    names; ``changes`` are of the model's ``config``."""
    words = dict(byte_level() if vocabulary is None else vocabulary)
    values = models.config(**changes)
    entries = _fields(values) | words | dict(fields or {})
    count = len(words.get("tokenizer.ggml.tokens") or ()) or models.VOCABULARY
    contents = gguf_tensors(values, count) | dict(tensors or {})
    endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, entries.pop("general.architecture"), endianess=endian)
    for key, value in entries.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in contents.items():
        if tensor is not None:
            _add_tensor(writer, name, tensor, (types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_gguf(path: Path, count: int) -> list[Path]:
    """The file in parts beside it, with the gguf package's words for them; the first one has all
    fields and no tensor."""
    whole = gguf.GGUFReader(path)
    parts = [path.with_name(f"{path.stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        if number:
            writer.kv_data[0].clear()  # of the architecture
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, count)
        writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(whole.tensors))
        for field in whole.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kinds = [*field.types, None]
                writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1])
        for tensor in whole.tensors[number - 1 :: count - 1] if number else ():
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def hugging_face_tensors(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The model's tensors by Hugging Face's names, none of them constant."""
    rng = np.random.default_rng(5)
    plain = models.tensors(**values)
    plain["model.embed_tokens.weight"] = np.zeros((count, values["hidden_size"]), np.float32)
    if not values["tie_word_embeddings"]:
        plain["lm_head.weight"] = np.zeros((count, values["hidden_size"]), np.float32)
    return {name: rng.normal(0, 0.2, t.shape).astype(np.float32) for name, t in plain.items()}


def gguf_tensors(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same by GGUF's names, rows of queries and keys as GGUF rotates them."""
    heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
    found = {}
    for name, tensor in hugging_face_tensors(values, count).items():
        *module, kind = name.split(".")
        layer = f"blk.{module[2]}." if module[1:2] == ["layers"] else ""
        ours = _NAMES[".".join(module[3:] if layer else module)]
        found[f"{layer}{ours}.{kind}"] = _interleaved(tensor, heads.get(ours, 0))
    return found


def _interleaved(tensor: Any, heads: int) -> Any:
    """Row i of a head's first half comes to 2 i, of its second half to 2 i + 1."""
    if not heads:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": values["num_hidden_layers"],
        "llama.context_length": values["max_position_embeddings"],
        "llama.embedding_length": values["hidden_size"],
        "llama.feed_forward_length": values["intermediate_size"],
        "llama.attention.head_count": values["num_attention_heads"],
        "llama.attention.head_count_kv": values["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        "llama.rope.freq_base": values["rope_theta"],
        "llama.rope.dimension_count": values["head_dim"],
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32}
        kinds |= {float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: Any, kind: GGMLQuantizationType | None
) -> None:
    if kind is None:
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    else:
        writer.add_tensor(name, quantized(tensor, kind), raw_dtype=kind)


def quantized(tensor: Any, kind: GGMLQuantizationType) -> Any:
    """A tensor's bytes in this type; arbitrary ones where gguf can't quantise to it."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        # the highest bits are clear, so that every scale is a finite number
        return np.random.default_rng(7).integers(0, 0x3C, shape, dtype=np.uint8)


def write_blocks(path: Path, kind: GGMLQuantizationType, **changes: Any) -> Path:
    """A file whose matrices are random blocks of one type, which no float was ever made of."""
    values = models.config(**changes)
    entries = _fields(values) | byte_level()
    count, rng = len(entries["tokenizer.ggml.tokens"]), np.random.default_rng(5)
    hidden, mlp, dim = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    q, kv = values["num_attention_heads"] * dim, values["num_key_value_heads"] * dim
    layer = {
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (count, hidden), "output_norm": (hidden,)}
    for index in range(values["num_hidden_layers"]):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    writer = gguf.GGUFWriter(path, entries.pop("general.architecture"))
    for key, value in entries.items():
        _add(writer, key, value)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            size = gguf.quant_shape_to_byte_shape(shape, kind)
            blocks = rng.integers(0, 0x3C, size, dtype=np.uint8)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Model files that nobody means well with, against what the importer's child does with them.

``python -m tests.support.hostile_models --count 1000 --seed 1`` prints what came of them as JSON;
exit code 1 if one of them took longer than 5 s or more than 500 MB, ended its process, or was
refused in more than one line or without the file's name.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from precast.models.importing import check_folder
from precast.models.importing.conversion import failure
from precast.models.importing.gguf import __main__ as converter
from tests.support.gguf_files import byte_level, sentencepiece, write_gguf
from tests.support.models import config, write_model

SECONDS: Final = 5.0
MEGABYTES: Final = 500
LONGEST: Final = 1200
"""Characters of a line."""
_LIMIT: Final = 4 << 30
"""As the importer has it."""
_OWN: Final = Path("/proc/self/status")

Random = random.Random
Json = Any
VALUES: Final[tuple[Json, ...]] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 65536, 2**24, 2**31 - 1, 2**31, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e308, 1e400, float("nan"),
    float("inf"), "", "x", "../../etc/passwd", "\x00", "\ud800", "a" * 70_000, [], [[]], [1, "a"],
    [None] * 50_000, {}, {"a": {}}, {"type": "BPE"}, [0.0] * 64, ["full_attention"] * 3,
)  # fmt: skip
NUMBERS: Final = (
    0, 1, 2, 7, 31, 32, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63,
    2**64 - 1, 2**64 - 32,
)  # fmt: skip


@dataclass
class Found:
    """What came of the files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """By kind of file and whether it was taken or refused."""
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_mb: float = 0.0


def batter(folder: Path, count: int, seed: int) -> Found:
    found = Found()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        place = folder / f"{kind.__name__.strip('_')}-{number}"
        place.mkdir()
        source = kind(place, Random(f"{seed}-{number}"))
        _try(source, found)
        shutil.rmtree(place)
    return found


def _try(source: Path, found: Found) -> None:
    """In a process of its own, as the importer does it; forked, for a fresh one takes longer than
    most files."""
    name = source.parent.name.partition("-")[0]
    log, started = source.parent / "log", time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(source, log)
    code, used = _ended(pid)
    seconds = time.monotonic() - started
    grown = source.parent / "grown"
    megabytes = int(grown.read_text()) / 1024 if grown.exists() else 0.0
    said = log.read_text("utf-8", "replace")
    found.slowest_s = max(found.slowest_s, used)
    found.largest_mb = max(found.largest_mb, megabytes)
    found.outcomes[f"{name} {'taken' if code == 0 else 'refused'}"] += 1
    problem = _problem(source, code, said)
    if used > SECONDS:
        problem = f"took {used:.1f} s of processor time, {seconds:.1f} s in all"
    if megabytes > MEGABYTES:
        problem = f"took {megabytes:.0f} MB"
    if problem:
        found.wrong.append(f"{source.parent.name}: {problem}: {said[:400]}")


def _ended(pid: int) -> tuple[int, float]:
    """Its exit code, and the processor time that it took."""
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _problem(source: Path, code: int, log: str) -> str:
    """What is wrong with what the importer says of it."""
    if code == 0:
        return ""
    if code not in (2, -signal.SIGABRT):  # a library that wants more memory than there is aborts
        return f"ended with {code}"
    said = str(failure(source, code, log))
    if "\n" in said or len(said) > LONGEST:
        return f"{len(said)} characters or several lines"
    return "" if str(source.parent) in said else "no name of a file"


def _become(source: Path, log: Path) -> None:
    """Never returns."""
    code = 70
    try:
        signal.alarm(10)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = _resident("VmRSS")
        with log.open("w", errors="backslashreplace") as err, Path(os.devnull).open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = out, err
            code = _import(source)
        (source.parent / "grown").write_text(str(_resident("VmHWM") - before))
    finally:
        os._exit(code)


def _resident(name: str) -> int:
    [line] = [line for line in _OWN.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])


def _import(source: Path) -> int:
    if source.is_dir():
        return check_folder.main(str(source), str(_LIMIT))
    target = source.parent / "converted"
    target.mkdir()
    code = converter.main(str(source), str(target), str(_LIMIT))
    if code == 0:
        (target / "model.gguf").hardlink_to(source)
        return check_folder.main(str(target), str(_LIMIT))
    return code


# -- GGUF


@cache
def _gguf_bytes(kind: int) -> bytes:
    words = (byte_level, sentencepiece)[kind % 2]()
    changes: dict[str, Any] = {"attention_bias": True} if kind >= 2 else {}
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "x.gguf", vocabulary=words, **changes).read_bytes()


def _gguf(place: Path, rng: Random) -> Path:
    """Bytes of the header changed."""
    data = bytearray(_gguf_bytes(rng.randrange(4)))
    header = _end_of_header(bytes(data))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_BYTES)(data, rng, header)
    path = place / "x.gguf"
    path.write_bytes(data)
    return path


def _end_of_header(data: bytes) -> int:
    """A little behind the last tensor's name."""
    return data.rindex(b".weight") + 64


def _flip(data: bytearray, rng: Random, header: int) -> None:
    data[rng.randrange(min(header, len(data)))] ^= 1 << rng.randrange(8)


def _number(data: bytearray, rng: Random, header: int) -> None:
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(min(header, len(data)) - size)
    data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")


def _count(data: bytearray, rng: Random, header: int) -> None:
    """Numbers of tensors and of fields."""
    del header
    at = rng.choice((4, 8, 16))
    data[at : at + 8] = rng.choice(NUMBERS).to_bytes(8, "little")


def _behind_name(data: bytearray, rng: Random, header: int) -> None:
    """What follows a name: a value's type, or a tensor's rank, sizes, type and offset."""
    del header
    names = [b"_weight", b"weight", b"count", b"length", b"tokens", b"merges", b"scores", b"type"]
    name = rng.choice(names)
    places = [at for at in range(len(data)) if data.startswith(name, at)][:200]
    if places:
        at = rng.choice(places) + len(name) + rng.choice((0, 4, 8, 12, 16, 20, 24, 28))
        size = rng.choice((4, 8))
        data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")


def _cut(data: bytearray, rng: Random, header: int) -> None:
    del data[rng.randrange(header) :]


def _drop(data: bytearray, rng: Random, header: int) -> None:
    at = rng.randrange(min(header, len(data)))
    del data[at : at + rng.choice((1, 4, 8, 64))]


def _again(data: bytearray, rng: Random, header: int) -> None:
    at = rng.randrange(min(header, len(data)))
    size = rng.choice((1, 8, 64, 4096))
    data[at:at] = data[at : at + size]


_BYTES: Final = (_flip, _number, _number, _count, _behind_name, _behind_name, _cut, _drop, _again)


def _gguf_fields(place: Path, rng: Random) -> Path:
    """A sound file whose fields or tensors say something else."""
    words = rng.choice((byte_level, sentencepiece))()
    known = [*words, *(f"llama.{name}" for name in _FIELDS), "general.alignment", "split.count"]
    fields: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        fields[rng.choice(known)] = _field(rng)
    if rng.random() < 0.3:
        name = rng.choice(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
        given = list(words.get(name) or ["a"])
        given[rng.randrange(len(given))] = rng.choice(("", "a", "a b", " ", "\x00", "z" * 9_000))
        fields[name] = given
    path = place / "x.gguf"
    return write_gguf(path, vocabulary=words, fields=fields)


_FIELDS: Final = (
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "expert_count",
    "expert_used_count", "attention.layer_norm_rms_epsilon", "rope.freq_base", "vocab_size",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length",
)  # fmt: skip


def _field(rng: Random) -> Any:
    return rng.choice((
        None, 0, 1, 3, 2**31 - 1, 2**32 - 1, 0.0, -1.0, float("nan"), float("inf"), 1e-30, 3e38,
        "", "yarn", "linear", "longrope", "gpt2", "llama", True, ["a"], ["a", "a"], [1, 2], [0.5],
        [2**31 - 1] * 9,
    ))  # fmt: skip


# -- folders of Hugging Face


@cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    return write_model(folder / "model")


def _folder(place: Path) -> Path:
    shutil.copytree(_template(), place / "model")
    return place / "model"


def _safetensors(place: Path, rng: Random) -> Path:
    """A header that lies."""
    folder = _folder(place)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(_HEADERS)(header, rng)
    text = _dumped(header)
    length = rng.choice((len(text),) * 6 + NUMBERS[:8] + (2**62, len(text) - 1, len(text) + 1))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return folder


def _entry(header: dict[str, Json], rng: Random) -> dict[str, Json]:
    entry: dict[str, Json] = header[rng.choice(list(header))]
    return entry if isinstance(entry, dict) else {}


def _other_offsets(header: dict[str, Json], rng: Random) -> None:
    entry = _entry(header, rng)
    begin, end = entry.get("data_offsets", [0, 4])[:2] if entry else (0, 4)
    entry["data_offsets"] = rng.choice((
        [end, begin], [0, end], [begin, begin], [begin, 2**63], [2**63, 2**64 - 1], [-4, end],
        [begin, end + 4], [begin], [begin, end, 0], "x", None, [0.5, 1.5],
    ))  # fmt: skip


def _other_shape(header: dict[str, Json], rng: Random) -> None:
    entry = _entry(header, rng)
    entry["shape"] = rng.choice((
        [], [0], [2**32, 2**32], [2**63, 2], [-1, 4], [1] * 1000, "x", None, [1.5], [2**64],
    ))  # fmt: skip


def _other_type(header: dict[str, Json], rng: Random) -> None:
    _entry(header, rng)["dtype"] = rng.choice(("F64", "I8", "F4", "", None, 3, "BOOL", "F8_E4M3"))


def _other_name(header: dict[str, Json], rng: Random) -> None:
    name = rng.choice(list(header))
    header[rng.choice(("", "x", "\x00", "model.layers.0.x.weight", name + "2"))] = header.pop(name)


def _hostile_node(header: dict[str, Json], rng: Random) -> None:
    _change(header, rng)


_HEADERS: Final = (_other_offsets, _other_offsets, _other_shape, _other_type, _other_name,
                   _hostile_node)  # fmt: skip


def _config(place: Path, rng: Random) -> Path:
    """``config.json`` of any architecture."""
    folder = _folder(place)
    values = config() | deepcopy(rng.choice(_CONFIGS))
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(values))
        if isinstance(values[name], dict) and rng.random() < 0.7:
            _change(values[name], rng)
        else:
            values[name] = rng.choice(VALUES)
    (folder / "config.json").write_bytes(_mangled(_dumped(values), rng))
    return folder


_LONGROPE: Final = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64}  # fmt: skip
_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16, "mlp_only_layers": [1],
                   "decoder_sparse_step": 1, "norm_topk_prob": True}  # fmt: skip
_WINDOWS: Final = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
                   "sliding_window_pattern": 2, "max_window_layers": 1,
                   "use_sliding_window": True}  # fmt: skip
_YARN: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None}  # fmt: skip


def _of(name: str, **more: Json) -> dict[str, Json]:
    return {"architectures": [f"{name}ForCausalLM"], **more}


_CONFIGS: Final = (
    _of("Llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}, attention_bias=True),
    _of("Llama", rope_parameters=dict(_YARN), quantization_config={
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    _of("Llama", quantization_config={"quant_method": "compressed-tensors", "format":
        "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}}}, "ignore": []}),
    _of("Llama", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
    _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _of("GptOss", num_local_experts=4, num_experts_per_tok=2, swiglu_limit=7.0, **_WINDOWS,
        quantization_config={"quant_method": "mxfp4"}),
    _of("Qwen2Moe", **_EXPERTS), _of("Qwen3Moe", **_EXPERTS, **_WINDOWS), _of("Qwen2", **_WINDOWS),
    _of("Phi3", rope_scaling=_LONGROPE, partial_rotary_factor=0.5), _of("Mistral", **_WINDOWS),
    _of("Gemma3", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=8, **_WINDOWS,
        rope_parameters={"full_attention": dict(_YARN), "sliding_attention": {}}),
    _of("Granite", attention_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=4.0),
    _of("Glm4", partial_rotary_factor=0.5), _of("Exaone4", **_WINDOWS), _of("Olmo2"),
    _of("SmolLM3", no_rope_layers=[1, 0], no_rope_layer_interval=4, **_WINDOWS),
)  # fmt: skip


def _tokenizer(place: Path, rng: Random) -> Path:
    """``tokenizer.json``, or what is read beside it."""
    folder = _folder(place)
    name = rng.choice(("tokenizer.json",) * 4 + ("tokenizer_config.json", "generation_config.json"))
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {"eos_token_id": [1, 2]}
    if rng.random() < 0.4 and name == "tokenizer.json":
        part, chosen = rng.choice(_PARTS)
        values[part] = deepcopy(chosen)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change(values, rng)
    path.write_bytes(_mangled(_dumped(values), rng))
    return folder


def _nested(depth: int, innermost: Json) -> Json:
    for _ in range(depth):
        innermost = {"type": "Sequence", "normalizers": [innermost]}
    return innermost


_PARTS: Final[tuple[tuple[str, Json], ...]] = (
    ("normalizer", _nested(40, {"type": "NFC"})),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a{1,9999}){1,9999}"}, "content": ""}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?<=("}, "behavior": "Isolated",
                       "invert": False}),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always"}),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x",
        "type_id": 0}}], "pair": [], "special_tokens": {}}),
    ("decoder", {"type": "Sequence", "decoders": [{"type": "Strip", "content": "", "start": 2**40,
                                                  "stop": 0}]}),
    ("model", {"type": "Unigram", "unk_id": 9, "vocab": [["a", float("nan")]]}),
    ("model", {"type": "BPE", "vocab": {"a": 2**32 - 1, "b": 0}, "merges": [["a", "b"]]}),
    ("model", {"type": "WordPiece", "vocab": {}, "unk_token": "x", "max_input_chars_per_word":
               2**63, "continuing_subword_prefix": "#"}),
    ("added_tokens", [{"id": 2**32 - 1, "content": "<x>", "special": True, "single_word": False,
                       "lstrip": False, "rstrip": False, "normalized": False}]),
    ("truncation", {"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Left"}),
    ("padding", {"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_to_multiple_of": 0,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
)  # fmt: skip


def _index(place: Path, rng: Random) -> Path:
    """An index of shards that names what is not there, or files that are none."""
    folder = _folder(place)
    weights = {"model.norm.weight": "model.safetensors"}
    value = rng.choice(
        (*VALUES, "model.safetensors", "x.safetensors", "../model/model.safetensors")
    )
    index = rng.choice(({"weight_map": weights | {"x": value}}, {"weight_map": value}, value))
    (folder / "model.safetensors.index.json").write_bytes(_mangled(_dumped(index), rng))
    if rng.random() < 0.3:
        name = rng.choice(("model.safetensors", "config.json", "tokenizer.json"))
        (folder / name).unlink()
        rng.choice((
            lambda path: path.symlink_to(path.name), os.mkfifo, lambda path: path.mkdir(),
        ))(folder / name)  # fmt: skip
    return folder


KINDS: Final[tuple[Callable[[Path, Random], Path], ...]] = (
    _gguf, _gguf_fields, _gguf, _safetensors, _config, _config, _tokenizer, _tokenizer, _index,
    _safetensors,
)  # fmt: skip


# -- JSON


def _change(root: Json, rng: Random) -> None:
    """One node somewhere in it, or one fewer, or one twice."""
    places = list(_nodes(root))
    if not places:
        return
    parent, key = rng.choice(places[:3] + places) if rng.random() < 0.5 else rng.choice(places[:40])
    act = rng.randrange(4)
    if act == 0:
        del parent[key]
    elif act == 1 and isinstance(parent, list):
        parent.append(deepcopy(parent[key]))
    else:
        parent[key] = rng.choice(VALUES)


def _nodes(root: Json) -> Iterator[tuple[Any, Any]]:
    keys = list(root) if isinstance(root, dict) else range(len(root))
    for key in keys:
        yield root, key
        if isinstance(root[key], dict | list):
            yield from _nodes(root[key])


def _dumped(value: Json) -> bytes:
    return json.dumps(value).encode()


def _mangled(text: bytes, rng: Random) -> bytes:
    """Most as they are; some cut off, nested, or with a byte changed."""
    act = rng.randrange(12)
    if act == 0:
        return text[: rng.randrange(len(text) + 1)]
    if act == 1:
        depth = rng.choice((200, 5_000, 200_000))
        return text[:1] + b'"x":' + b"[" * depth + b"]" * depth + b"," + text[1:]
    if act == 2 and text:
        at = rng.randrange(len(text))
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if act == 3:
        return b"\xef\xbb\xbf" + text
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = batter(Path(folder), options.count, options.seed)
    shutil.rmtree(_template().parent)
    told = {"outcomes": dict(sorted(found.outcomes.items())), "slowest_s": found.slowest_s}
    print(json.dumps(told | {"largest_mb": found.largest_mb, "wrong": found.wrong}, indent=1))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

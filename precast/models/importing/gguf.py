"""Turns a GGUF file into a Hugging Face folder.

Usage: ``python -m precast.models.importing.gguf FILE FOLDER MEMORY_BYTES``. The importer's child
process, so that a conversion that runs out of memory or is killed takes nothing with it. Prints one
JSON line a stage; ends with 2 and one line on stderr if it refuses the file.
"""

import functools
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from precast.errors import ModelCorrupt, PrecastError, UnsupportedArchitecture
from precast.models.config import ARCHITECTURES
from precast.system.process import die_with_parent

ARCHITECTURE_KEYS: Final = {"llama": "LlamaForCausalLM"}
"""``general.architecture`` and the Hugging Face class that it is."""
PRE_TOKENIZERS: Final = ("default", "gpt-2", "smollm")
"""``tokenizer.ggml.pre`` of byte-level vocabularies that come out of transformers' conversion as
they were trained. Others split text in their own ways, which the conversion would lose."""
END_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>")
"""Tokens that end an answer in common chat templates."""


def convert(source: Path, target: Path) -> None:
    """Write ``target``'s files. Raises ``ModelCorrupt`` or ``UnsupportedArchitecture``."""
    _report("reading the file")
    _read_once()
    fields = read_fields(source)
    check_fields(source, fields)
    _report("loading libraries")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _report("converting the tokenizer")
    _write_tokenizer(source, target, fields)
    _report("dequantising weights to fp32")
    _write_model(source, target, fields)


def _read_once() -> None:
    """Share one reader of the file: transformers opens it anew for each of its parts.

    Reading takes seconds, because every token of the vocabulary is a field part. This process reads
    one file and ends.
    """
    import gguf

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # type: ignore[misc, assignment]


def read_fields(source: Path) -> dict[str, Any]:
    """The file's metadata without the vocabulary. Raises ``ModelCorrupt``."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(source)).fields
        return {
            name: field.contents()
            for name, field in fields.items()
            if not name.startswith("tokenizer.ggml.") or len(field.data) == 1
        } | {"has_vocabulary": "tokenizer.ggml.tokens" in fields}
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelCorrupt(f"{source}: not a readable GGUF file: {_one_line(error)}") from None


def check_fields(source: Path, fields: Mapping[str, Any]) -> None:
    """Raises ``UnsupportedArchitecture`` or ``ModelCorrupt`` if the model can't be imported."""
    architecture = fields.get("general.architecture", "(none)")
    if ARCHITECTURE_KEYS.get(str(architecture)) not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURE_KEYS))
        raise UnsupportedArchitecture(
            f"{source}: architecture {architecture} is not one of: {known}"
        )
    if not fields["has_vocabulary"]:
        raise ModelCorrupt(f"{source}: the file has no vocabulary")
    split = fields.get("tokenizer.ggml.pre", "default")
    if fields.get("tokenizer.ggml.model") == "gpt2" and split not in PRE_TOKENIZERS:
        raise UnsupportedArchitecture(
            f"{source}: pre-tokenizer {split} can't be had from GGUF, only: "
            f"{', '.join(PRE_TOKENIZERS)}; import the model's Hugging Face folder instead"
        )


def end_ids(fields: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[int]:
    """Token ids that end a generation: the file's own, and the chat template's end of turn."""
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [int(fields[name]) for name in names if name in fields]
    template = str(fields.get("tokenizer.chat_template", ""))
    ids += [vocabulary[token] for token in END_OF_TURN if token in template and token in vocabulary]
    return list(dict.fromkeys(ids))


def _write_tokenizer(source: Path, target: Path, fields: Mapping[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(target)
    ids: dict[str, Any] = {"eos_token_id": end_ids(fields, tokenizer.get_vocab())}
    for name in ("bos", "padding"):
        if (value := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            ids[f"{'pad' if name == 'padding' else name}_token_id"] = int(value)
    _write_json(target / "generation_config.json", ids)


def _write_model(source: Path, target: Path, fields: Mapping[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(min(4, torch.get_num_threads()))
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    _report("writing the folder")
    weights = target / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the library makes it its owner's alone; other services read it
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    architecture = ARCHITECTURE_KEYS[str(fields["general.architecture"])]
    _write_json(target / "config.json", config | {"architectures": [architecture]})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def _report(stage: str) -> None:
    sys.stdout.write(json.dumps({"stage": stage}) + "\n")
    sys.stdout.flush()


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def main(source: str, target: str, memory_bytes: str) -> int:
    """The process: convert within a bound of memory. The exit code."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    try:
        convert(Path(source), Path(target))
    except PrecastError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except MemoryError:
        needed = int(memory_bytes) >> 20
        sys.stderr.write(f"PrecastError: {source}: needs more than {needed} MiB of memory\n")
        return 2
    except Exception as error:  # libraries raise all kinds for broken files
        sys.stderr.write(f"ModelCorrupt: {source}: {_one_line(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

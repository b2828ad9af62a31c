"""Makes a model folder of a GGUF file, without a random or a lost tensor: what other files say in
Hugging Face's words, and an index of the file's own blocks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from precast.models.config import load_config
from precast.models.gguf_index import write_index
from precast.models.importing.gguf.architectures import (
    architecture_of,
    check_name,
    config_of,
    sizes_of,
)
from precast.models.importing.gguf.header import GgufFile, first_text
from precast.models.importing.gguf.metadata import Metadata
from precast.models.importing.gguf.tensors import wanted_tensors
from precast.models.importing.gguf.tokenizer import Vocabulary, build_tokenizer, read_vocabulary
from precast.models.importing.gguf.weights import check_numbers, index_of
from precast.tokenizer.template_files import FILE as TEMPLATE_FILE
from precast.tokenizer.template_files import TOOL_FILE

_ARCHITECTURE: Final = "general.architecture"
END_OF_TURN: Final = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"),
    *("<|return|>", "<|call|>"),
)
"""Tokens that end an answer in common chat templates."""
_CHANNELS: Final = "<|channel|>"
_END_OF_MESSAGE: Final = "<|end|>"
"""Where a template has channels it ends one of an answer's messages: reasoning, say."""


def convert(source: Path, target: Path, report: Callable[[str], None]) -> None:
    """Write ``target``'s files; the blocks stay where they are. Raises ``ModelCorrupt`` or
    ``UnsupportedArchitecture``."""
    report("reading the file")
    # first, because a large vocabulary takes a second to read
    if (claimed := first_text(source, _ARCHITECTURE)) is not None:
        check_name(source, claimed)
    file = GgufFile(source)
    architecture = file.text(_ARCHITECTURE, "(none)")
    own = architecture_of(file, architecture)
    vocabulary = read_vocabulary(file)
    data = Metadata(file, architecture)
    sizes = sizes_of(own, data, vocabulary)
    wanted = wanted_tensors(file, sizes, own.layout)
    _write_json(target / "config.json", config_of(own, data, sizes, vocabulary))
    load_config(target)
    write_index(target, index_of(file, wanted))
    report("converting the tokenizer")
    _write_tokenizer(data, vocabulary, target)
    report("checking the weights")
    check_numbers(file, wanted)


def end_ids(vocabulary: Vocabulary, template: str) -> list[int]:
    """Token ids that end a generation: the file's own, and the chat template's end of turn."""
    known = {text: index for index, text in enumerate(vocabulary.tokens)}
    ids = [vocabulary.eos, vocabulary.eot, vocabulary.eom]
    ids += [known[token] for token in END_OF_TURN if token in template and token in known]
    within = known.get(_END_OF_MESSAGE) if _CHANNELS in template else None
    return [token for token in dict.fromkeys(ids) if token is not None and token != within]


def _write_tokenizer(data: Metadata, vocabulary: Vocabulary, target: Path) -> None:
    file = data.file
    build_tokenizer(file, vocabulary).save(str(target / "tokenizer.json"))
    template = file.text("tokenizer.chat_template")
    if template:
        (target / TEMPLATE_FILE).write_text(template, "utf-8")
    if for_tools := file.text("tokenizer.chat_template.tool_use"):
        (target / TOOL_FILE).parent.mkdir()
        (target / TOOL_FILE).write_text(for_tools, "utf-8")
    names = {
        "bos_token": vocabulary.text(vocabulary.bos),
        "eos_token": vocabulary.text(vocabulary.eos),
        "pad_token": vocabulary.text(vocabulary.padding),
        "unk_token": vocabulary.text(vocabulary.unknown),
    }
    config = {
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": data.integer("context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(target / "tokenizer_config.json", config | _given(names))
    ids = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": end_ids(vocabulary, template),
        "pad_token_id": vocabulary.padding,
    }
    _write_json(target / "generation_config.json", _given(ids))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")

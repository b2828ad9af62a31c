"""A model's tokenizer and chat template, out of its folder."""

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from precast.errors import ModelCorrupt
from precast.log import get_logger
from precast.system.held_folders import replaced_folders
from precast.tokenizer.chat_template import (
    PLAIN,
    ChatOptions,
    ChatTemplate,
    read_chat_template,
)
from precast.tokenizer.control_tokens import ControlTokens
from precast.tokenizer.digest import tokenizer_digest
from precast.tokenizer.load import load_tokenizer
from precast.tokenizer.template_files import FILE as TEMPLATE_FILE
from precast.tokenizer.template_files import FOLDER as TEMPLATE_FOLDER

log = get_logger(__name__)

_LONG_TEXT: Final = 4096
"""Characters from which tokenising goes to a thread: shorter ones take less than a millisecond."""
_MAX_LOADED: Final = 16
_MAX_EARLIER: Final = 4


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat as its template writes it."""

    text: str
    marked: bool
    """Whether texts in it hold names of control tokens, which are marked then."""


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """One model's tokenizer and chat template."""

    model: str
    tokenizer: Tokenizer
    vocab_size: int
    """Token ids are less than this."""
    longest_token: int
    """Characters of text that one token may stand for, at the most."""
    chat_template: ChatTemplate
    tool_template: ChatTemplate
    """For chats with tools."""
    control_tokens: ControlTokens
    digest: str
    """Of what turns text into tokens and chats into text; see ``tokenizer_digest``."""

    def template(self, *, tools: bool) -> ChatTemplate:
        """For chats with or without tools."""
        return self.tool_template if tools else self.chat_template

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text, in which names of control tokens are these tokens. Long texts
        don't hold up the event loop."""
        if sum(map(len, texts)) < _LONG_TEXT:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions = PLAIN,
        *,
        allow_control_tokens: bool = False,
    ) -> Chat:
        """The chat up to where the assistant's answer begins.

        Raises ``InvalidRequest`` where the model has no template, or it fails or refuses.
        """
        # In a thread, because a template may take as long as it is allowed to.
        return await asyncio.to_thread(self._render, messages, options, allow_control_tokens)

    async def encode_chat(self, chat: Chat, *, add_special_tokens: bool = False) -> list[int]:
        """Its token ids; control tokens come only from the template. Raises ``InvalidRequest``."""
        if chat.marked:
            return await asyncio.to_thread(self.control_tokens.encode, chat.text)
        # The template has written the special tokens.
        (ids,) = await self.encode([chat.text], add_special_tokens=add_special_tokens)
        return ids

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions,
        allow_control_tokens: bool,
    ) -> Chat:
        template = self.template(tools=bool(options.tools))
        texts = [*messages, *options.tools]  # the tools' too come from others
        marked = None if allow_control_tokens else self.control_tokens.mark(texts)
        if marked is None:
            return Chat(text=template.render(messages, options), marked=False)
        clean = replace(options, tools=marked[len(messages) :])
        text = template.render(marked[: len(messages)], clean)
        return Chat(text=text, marked=True)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # Unlike ``encode`` this releases the GIL, and computes no offsets: four times as fast.
        batch = list(texts)
        encoded = self.tokenizer.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encoded]


class TokenizerStore:
    """Tokenizers of the models in a folder; read when first needed and when a file changes."""

    def __init__(self, models_dir: Path) -> None:
        self._models_dir = models_dir
        self._loaded: dict[str, tuple[object, ModelTokenizer]] = {}
        self._loading = asyncio.Lock()

    async def get(self, model: str) -> ModelTokenizer:
        """Raises ``ModelCorrupt`` where the folder or a file in it is missing or unreadable."""
        folder = self._models_dir / model
        if folder.parent != self._models_dir or model in (".", ".."):
            raise ModelCorrupt(f"The model name {model!r} is not the name of a folder.")
        stamp = _stamp(folder)
        known = self._loaded.get(model)
        if known is not None and known[0] == stamp:
            return known[1]
        async with self._loading:
            return await self._load(folder, stamp)

    async def earlier(self, model: str) -> list[ModelTokenizer]:
        """Those of folders that were replaced while a worker has them, the latest first."""
        folders = await asyncio.to_thread(replaced_folders, self._models_dir, model)
        found = []
        for folder in folders[:_MAX_EARLIER]:
            with suppress(ModelCorrupt):
                found.append(await self.get(folder.name))
        return found

    async def _load(self, folder: Path, stamp: object) -> ModelTokenizer:
        known = self._loaded.pop(folder.name, None)
        if known is None or known[0] != stamp:
            known = stamp, await asyncio.to_thread(read_model_tokenizer, folder)
        while len(self._loaded) >= _MAX_LOADED:
            del self._loaded[next(iter(self._loaded))]
        self._loaded[folder.name] = known
        return known[1]


_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "config.json")


def _stamp(folder: Path) -> object:
    """Changes whenever one of the files does. Every request asks: no path objects."""
    root = str(folder)
    names = [*_FILES, TEMPLATE_FILE]
    with suppress(OSError):  # most models have no such folder
        names += sorted(f"{TEMPLATE_FOLDER}/{x}" for x in os.listdir(f"{root}/{TEMPLATE_FOLDER}"))  # noqa: PTH208
    return tuple((name, _file_stamp(f"{root}/{name}")) for name in names)


def _file_stamp(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def read_model_tokenizer(folder: Path) -> ModelTokenizer:
    """Read a model folder. Raises ``ModelCorrupt`` with the file's name."""
    start = time.monotonic()
    digest = tokenizer_digest(folder)
    tokenizer = load_tokenizer(folder)
    config = _read_json(folder / "tokenizer_config.json")
    declared = _read_json(folder / "config.json").get("vocab_size", 0)
    if not isinstance(declared, int):
        raise ModelCorrupt(f"{folder / 'config.json'}: vocab_size is not an integer")
    template = read_chat_template(folder, config)
    for_tools = read_chat_template(folder, config, without_tools=template)
    loaded = ModelTokenizer(
        model=folder.name,
        tokenizer=tokenizer,
        vocab_size=max(tokenizer.get_vocab_size(with_added_tokens=True), declared),
        longest_token=max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1),
        chat_template=template,
        tool_template=for_tools,
        control_tokens=ControlTokens(tokenizer, template.literals + for_tools.literals),
        digest=digest,
    )
    load_ms = round(1000 * (time.monotonic() - start))
    log.info("tokenizer loaded", model=folder.name, load_ms=load_ms, chat=template.reason or "yes")
    return loaded


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise ModelCorrupt(f"{path}: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path}: not a JSON object")
    return value

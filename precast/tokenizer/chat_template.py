"""Text to token ids, and chats to text: what a model folder says about both.

``tokenizer.json`` is read by ``tokenizers``; the chat template (``chat_template.jinja``, or the one
in ``tokenizer_config.json``) is rendered in a sandbox, with the helpers that templates written for
``transformers`` expect.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from precast.errors import InvalidRequest, ModelCorrupt
from precast.log import get_logger
from precast.tokenizer import load as tokenizers

log = get_logger(__name__)

_LONG_TEXT: Final = 4096
"""Characters from which tokenising goes to a thread: shorter ones take less than a millisecond."""
_MAX_LOADED: Final = 16


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """One model's tokenizer and chat template."""

    model: str
    tokenizer: Tokenizer
    vocab_size: int
    """Token ids are less than this."""
    template: jinja2.Template | None
    special_tokens: Mapping[str, str]
    """``bos_token`` and the like, for the template."""

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Long texts don't hold up the event loop."""
        if sum(map(len, texts)) < _LONG_TEXT:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat as text, up to where the assistant's answer begins.

        Raises ``InvalidRequest`` where the model has no template or the template refuses.
        """
        if self.template is None:
            raise InvalidRequest(
                f"The model {self.model!r} has no chat template; use /v1/completions."
            )
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=True, **self.special_tokens
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise InvalidRequest(f"The model's chat template refuses the messages: {error}") from (
                None
            )

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

    async def _load(self, folder: Path, stamp: object) -> ModelTokenizer:
        known = self._loaded.pop(folder.name, None)
        if known is None or known[0] != stamp:
            known = stamp, await asyncio.to_thread(load_tokenizer, folder)
        while len(self._loaded) >= _MAX_LOADED:
            del self._loaded[next(iter(self._loaded))]
        self._loaded[folder.name] = known
        return known[1]


_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


def _stamp(folder: Path) -> object:
    """Changes whenever one of the files does."""
    return tuple(_file_stamp(folder / name) for name in _FILES)


def _file_stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Read a model folder. Raises ``ModelCorrupt`` with the file's name."""
    start = time.monotonic()
    tokenizer = tokenizers.load_tokenizer(folder)
    config = _read_json(folder / "tokenizer_config.json")
    declared = _read_json(folder / "config.json").get("vocab_size", 0)
    if not isinstance(declared, int):
        raise ModelCorrupt(f"{folder / 'config.json'}: vocab_size is not an integer")
    loaded = ModelTokenizer(
        model=folder.name,
        tokenizer=tokenizer,
        vocab_size=max(tokenizer.get_vocab_size(with_added_tokens=True), declared),
        template=_template(folder, config),
        special_tokens=_special_tokens(config),
    )
    log.info(
        "tokenizer loaded", model=folder.name, load_ms=round(1000 * (time.monotonic() - start))
    )
    return loaded


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path}: not a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Values are strings, or objects with the string as ``content``."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
    found = {name: config[name] for name in names if config.get(name)}
    return {
        name: str(value["content"] if isinstance(value, dict) else value)
        for name, value in found.items()
    }


def _template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    """The compiled chat template, or None where the model has none."""
    path = folder / "chat_template.jinja"
    try:
        source = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else _environment().from_string(source)
    except (OSError, ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise ModelCorrupt(f"{folder}: the chat template is broken: {error}") from None


def _environment() -> jinja2.Environment:
    """A sandbox with what ``transformers`` gives to templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = time.strftime
    return environment


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

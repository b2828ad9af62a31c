"""Chats to text, as a model folder's templates say.

Templates come from ``chat_template.jinja`` and ``additional_chat_templates/``, or else from
``tokenizer_config.json``. A broken one costs chats only: a folder's completions work without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2 import nodes

from precast.errors import InvalidRequest
from precast.tokenizer.template_environment import ChatEnvironment
from precast.tokenizer.template_files import DEFAULT, FOR_TOOLS, template_files

_SPECIAL_TOKENS: Final = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_environment: Final = ChatEnvironment()


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What else a template is told."""

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Such as ``enable_thinking``; the template's own, such as ``messages``, aren't among them."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The text ends with the last message's, for the answer to go on with it."""
    placeholders: Mapping[str, str] = field(default_factory=dict)
    """Words in messages, and what stands for each in the chat as if the template had written it.
    They have to be such as nobody guesses."""


PLAIN: Final = ChatOptions()


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatTemplate:
    """A model's way to write chats. Equal is only what is the same, so that caches may hold it."""

    template: jinja2.Template | None
    reason: str = ""
    """Why there is no template: a sentence for the caller."""
    variables: Mapping[str, str]
    """``bos_token`` and the like."""
    source: str = ""
    """The template itself."""
    literals: str = ""
    """The text that the template itself can write."""

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = PLAIN) -> str:
        """The chat as text, up to where the assistant's answer begins. Takes 2 s at most.

        Raises ``InvalidRequest`` where there is no template, or the template fails or refuses.
        """
        if self.template is None:
            raise InvalidRequest(self.reason)
        if options.continue_final_message:
            messages = [*messages[:-1], _with_end(messages[-1])]
        try:
            with _environment.limited():
                text = self.template.render(
                    {
                        **options.variables,
                        **self.variables,
                        "messages": messages,
                        "tools": list(options.tools) or None,
                        "documents": None,
                        "add_generation_prompt": options.add_generation_prompt
                        and not options.continue_final_message,
                    }
                )
        except Exception as error:  # a template is foreign code and may raise anything
            reason = _one_line(error)
            raise InvalidRequest(f"The model's chat template refuses the messages: {reason}") from (
                None
            )
        for placeholder, own in options.placeholders.items():
            text = text.replace(placeholder, own)
        return _left_open(text) if options.continue_final_message else text


_END: Final = "THE_FINAL_MESSAGE_GOES_ON_HERE "
"""Stands behind the text of a message that is to go on. What the template writes behind that may
well have the message's own text in it. The blank shows whether the template trims texts."""


def _with_end(last: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ``InvalidRequest``."""
    said = last["content"]
    if not isinstance(said, str):
        raise InvalidRequest("The last message has no text to go on with.")
    return {**last, "content": said + _END}


def _left_open(text: str) -> str:
    """The chat up to the end of its last message's text. Raises ``InvalidRequest``."""
    at = text.rfind(_END.rstrip())
    if at < 0:
        raise InvalidRequest("The chat template doesn't show the last message as it is.")
    return text[:at] if text.startswith(_END, at) else text[:at].rstrip()


def read_chat_template(
    folder: Path, config: Mapping[str, Any], *, without_tools: ChatTemplate | None = None
) -> ChatTemplate:
    """The folder's default template or, where that is given as ``without_tools``, the one for chats
    with tools: the same where it has none of its own for them. ``config``:
    ``tokenizer_config.json``. Raises nothing."""
    variables = _variables(config)
    try:
        sources = _sources(folder, config)
        if without_tools is None:
            source = _default(folder.name, sources)
        elif not (source := sources.get(FOR_TOOLS, "")):
            return without_tools
        template, literals = _compiled(source)
    except InvalidRequest as missing:
        return ChatTemplate(template=None, reason=str(missing), variables=variables)
    except Exception as error:  # the compiler raises many kinds
        where = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = f"The chat template of {folder.name!r} is broken: {where}{_one_line(error)}"
        return ChatTemplate(template=None, reason=reason, variables=variables)
    return ChatTemplate(template=template, variables=variables, source=source, literals=literals)


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files replace all that the config has, as with ``transformers``."""
    default, *others = template_files(folder)
    files = {path.stem: path for path in others}
    if default.is_file():
        files[DEFAULT] = default
    if files:
        return {name: path.read_text("utf-8") for name, path in files.items()}
    return _named(config.get("chat_template"))


def _named(found: object) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):  # several
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict) and all(isinstance(source, str) for source in found.values()):
        return found
    raise ValueError("chat_template is neither a text nor a list of names and templates")


def _default(model: str, sources: Mapping[str, str]) -> str:
    """Raises ``InvalidRequest`` if there is none."""
    if not sources:
        raise InvalidRequest(f"The model {model!r} has no chat template; use /v1/completions.")
    if DEFAULT not in sources:
        names = ", ".join(sorted(sources))
        raise InvalidRequest(f"None of the chat templates of {model!r} is the default: {names}.")
    return sources[DEFAULT]


def _compiled(source: str) -> tuple[jinja2.Template, str]:
    """The template, and the texts in it with zeros between them."""
    tree = _environment.parse(source)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [str(node.value) for node in tree.find_all(nodes.Const)]
    return _environment.from_string(source), "\0".join(texts)


def _variables(config: Mapping[str, Any]) -> dict[str, str]:
    """Values are strings, or objects with the string as ``content``."""
    found = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name)}
    return {
        name: str(value.get("content", "") if isinstance(value, dict) else value)
        for name, value in found.items()
    }


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

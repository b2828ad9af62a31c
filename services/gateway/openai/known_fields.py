"""Fields that clients send and this server doesn't serve: which are refused, which mean nothing.

A field that would change the result is refused by name unless it has its neutral value. One that
only labels a request is accepted. All others are unknown: they are ignored, and the answer says so.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Final

from services.gateway.openai.fields import whole
from services.gateway.openai.messages import UnsupportedField

Neutral = Mapping[str, tuple[Any, ...]]
"""Known fields that aren't supported, and the values (beside null) that ask for nothing."""
NEUTRAL: Final[Neutral] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "typical_p": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "n_keep": (0,),
}
"""Of completions and chats."""

LABELS: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_retention",
        "guided_decoding_backend",
        "cache_prompt",
        "id_slot",
        "request_id",
        "timings_per_token",
    }
)
"""Fields that don't change a result."""


def served(data: Any, unserved: Neutral, labels: Set[str]) -> Any:
    """A body's fields without those that ask for nothing. Raises ``UnsupportedField`` for one that
    does ask for something."""
    if not isinstance(data, dict):
        return data
    for name in unserved.keys() & data.keys():
        if not _asks_for_nothing(data[name], unserved[name]):
            raise UnsupportedField(name)
    ignored = unserved.keys() | labels
    return {name: whole(value) for name, value in data.items() if name not in ignored}


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether it is null or neutral; false is not 0 here."""
    if value is None:
        return True
    return value in [one for one in neutral if isinstance(one, bool) == isinstance(value, bool)]


def describing(unserved: Iterable[str], labels: Iterable[str]) -> Callable[[dict[str, Any]], None]:
    """Adds to a schema, for a reference, what else a body may have."""

    def describe(schema: dict[str, Any]) -> None:
        schema["description"] = described(unserved, labels)

    return describe


def described(unserved: Iterable[str], labels: Iterable[str]) -> str:
    neutral = "Only null, or a value that asks for nothing, is accepted for: "
    return f"{neutral}{', '.join(sorted(unserved))}. Ignored: {', '.join(sorted(labels))}."

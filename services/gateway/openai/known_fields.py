"""Fields that clients send and this server doesn't serve: which are refused, which mean nothing.

A field that would change the result is refused by name unless it has its neutral value. One that
only labels a request is accepted. All others are unknown: they are ignored, and the answer says so.
"""

from collections.abc import Iterable
from typing import Any, Final

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
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
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "prompt_logprobs": (0,),
    "typical_p": (1,),
    "mirostat": (0,),
    "repeat_penalty": (1,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "n_predict": (-1,),
    "n_keep": (0,),
}
"""Known fields that aren't supported, and the values (beside null) that ask for nothing."""

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


def described(unserved: Iterable[str], labels: Iterable[str]) -> str:
    """For a reference: what else a body may have."""
    neutral = "Only null, or a value that asks for nothing, is accepted for: "
    return f"{neutral}{', '.join(sorted(unserved))}. Ignored: {', '.join(sorted(labels))}."


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether an unsupported field may be left out: it is null or neutral; false is not 0 here."""
    if value is None:
        return True
    kin = [one for one in NEUTRAL[name] if isinstance(one, bool) == isinstance(value, bool)]
    return value in kin

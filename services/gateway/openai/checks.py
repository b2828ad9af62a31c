"""Fields of one request that have to go together, and with its model."""

from typing import Final

from precast.tokenizer.model_tokenizer import ModelTokenizer
from services.gateway.openai.errors import invalid
from services.gateway.openai.fields import MAX_CHOICES
from services.gateway.openai.generation_fields import GenerationFields
from services.gateway.openai.prompts import check_ids
from services.gateway.openai.schemas import CompletionRequest
from services.gateway.openai.starts import Wanted

_SAME: Final = (
    ("n_predict", "max_tokens"),
    ("n_predict", "max_completion_tokens"),
    ("repeat_penalty", "repetition_penalty"),
)
"""Names for one thing."""


def check_fields(body: GenerationFields, tokenizer: ModelTokenizer) -> None:
    """Raises ``ApiError`` 400 for token ids that there are not, and fields that contradict."""
    check_ids("logit_bias", list(body.logit_bias), tokenizer)
    check_ids("allowed_token_ids", body.allowed_token_ids or (), tokenizer)
    for name, other in _SAME:
        if None not in (getattr(body, name), getattr(body, other, None)):
            raise invalid(f"'{name}' can't be combined with '{other}'.", name)
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("'prompt_logprobs' can't be combined with 'stream'.", "prompt_logprobs")


def check_free(body: GenerationFields, wanted: Wanted) -> None:
    """Raises ``ApiError`` 400 for single tokens that are forbidden where a grammar may need them:
    there might be none left."""
    for field in ("allowed_token_ids", "bad_words"):
        if getattr(body, field) and wanted.constraint is not None:
            raise invalid(f"'{field}' can't be combined with a grammar or a schema.", field)


def check_choices(body: CompletionRequest) -> None:
    """Raises ``ApiError`` 400 for numbers that don't go together."""
    each, prompts = body.generated_per_prompt, len(body.prompts)
    if each < body.choices_per_prompt:
        raise invalid("Invalid 'best_of': must be at least n.", "best_of")
    if body.stream and each > body.choices_per_prompt:
        raise invalid("Invalid 'best_of': must equal n when stream is true.", "best_of")
    if body.asked_tokens == 0 and not body.echo:
        field = "max_tokens" if body.n_predict is None else "n_predict"
        raise invalid(f"Invalid '{field}': may only be 0 when echo is true.", field)
    if body.suffix and body.echo:
        raise invalid("Invalid 'suffix': can't be combined with echo.", "suffix")
    if prompts * each > MAX_CHOICES:
        field = "n" if body.best_of is None else "best_of"
        asked = f"{prompts} prompts times {field} = {each}"
        reason = f"{asked} is too much; at most {MAX_CHOICES} choices"
        raise invalid(f"Invalid '{field}': {reason}.", field)


def scored(body: CompletionRequest) -> int | None:
    """Likeliest tokens to report beside each of the prompt; None: they are not scored. Raises
    ``ApiError`` 400 where two numbers of them are asked for."""
    if not body.echo or (body.logprobs is None and body.asked_tokens != 0):
        return body.prompt_logprobs
    echoed = body.logprobs or 0
    if body.prompt_logprobs not in (None, echoed):
        reason = "it must be the same as logprobs with echo"
        raise invalid(f"Invalid 'prompt_logprobs': {reason}.", "prompt_logprobs")
    return echoed

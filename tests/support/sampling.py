"""How a sequence draws, with defaults: the likeliest token and nothing else."""

from services.decode_worker.ranks.protocol import StartSampling


def new_sampling(slot: int, **changes: object) -> StartSampling:
    values: dict[str, object] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 0,
        "logprobs": -1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "prompt_token_ids": b"",
        "output_token_ids": b"",
        "bias_token_ids": b"",
        "bias_values": b"",
    }
    return StartSampling(slot=slot, **{**values, **changes})  # type: ignore[arg-type]

"""llama.cpp as a peer: one process that measures what it is told, so that runs can alternate.

    python llama_peer.py MODEL.gguf --cpus 0,1 --context 128

Reads one JSON object a line from stdin, {"decode": width, "steps": n} or {"prefill": tokens}, and
answers with {"seconds": [...]}. {"quantize": type, "to": path} makes another GGUF of the model.
Needs llama-cpp-python.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp as api


class Peer:
    def __init__(
        self, path: str, *, threads: int, context: int, width: int, flash: bool, repack: bool
    ) -> None:
        self._context = context
        api.llama_backend_init()
        api.llama_log_set(_SILENT, ctypes.c_void_p(0))
        model_params = api.llama_model_default_params()
        model_params.use_extra_bufts = repack  # weights in the layout of the CPU's fastest kernels
        self._model = api.llama_model_load_from_file(path.encode(), model_params)
        params = api.llama_context_default_params()
        # each sequence has its share of the context
        params.n_ctx, params.n_seq_max = width * max(context + 64, 640), width
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._state: Any = api.llama_init_from_model(self._model, params)
        self._memory = api.llama_get_memory(self._state)

    def _run(self, tokens: list[tuple[int, int, int]], logits: set[int]) -> float:
        """Decodes (token, position, sequence) rows; returns seconds."""
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in logits
        start = time.perf_counter()
        if api.llama_decode(self._state, batch) != 0:
            raise RuntimeError("llama_decode failed")
        api.llama_synchronize(self._state)
        seconds = time.perf_counter() - start
        api.llama_batch_free(batch)
        return seconds

    def decode(self, width: int, steps: int) -> list[float]:
        """Seconds of each step of ``width`` sequences whose contexts begin at the given length."""
        api.llama_memory_clear(self._memory, True)
        self._run([(i % 1000 + 10, i, 0) for i in range(self._context)], set())
        for sequence in range(1, width):
            api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        return [
            self._run([(100 + s, self._context + step, s) for s in range(width)], set(range(width)))
            for step in range(steps)
        ]

    def prefill(self, tokens: int) -> list[float]:
        api.llama_memory_clear(self._memory, True)
        return [self._run([(i % 1000 + 10, i, 0) for i in range(tokens)], {tokens - 1})]


def quantize(source: str, name: str, target: str) -> None:
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
    params.allow_requantize, params.pure, params.nthread = True, True, 2
    api.llama_log_set(_SILENT, ctypes.c_void_p(0))
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"{source}: can't be quantised to {name}")


@api.llama_log_callback
def _SILENT(level: int, text: bytes, data: object) -> None:  # noqa: N802
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--cpus", required=True, help="cores, one thread each: 0,1")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--flash", action="store_true", help="flash attention")
    parser.add_argument("--repack", action="store_true", help="repack weights for this CPU")
    arguments = parser.parse_args()
    cpus = [int(cpu) for cpu in arguments.cpus.split(",")]
    os.sched_setaffinity(0, cpus)
    peer: Peer | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if "quantize" in order:
            quantize(arguments.model, order["quantize"], order["to"])
            print(json.dumps({"seconds": []}), flush=True)
            continue
        peer = peer or Peer(
            arguments.model,
            threads=len(cpus),
            context=arguments.context,
            width=arguments.width,
            flash=arguments.flash,
            repack=arguments.repack,
        )
        if "decode" in order:
            seconds = peer.decode(order["decode"], order["steps"])
        else:
            seconds = peer.prefill(order["prefill"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

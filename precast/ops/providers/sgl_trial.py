"""Whether upstream's library runs on a CPU that it may not be built for.

It is tried in a process of its own: an instruction that the CPU lacks ends the process, and so does
a check that fails in a parallel region, as where a kernel was left out. The program prints a line
for each of our operators: its name, a tab, and what was wrong.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from signal import Signals
from typing import Final

import torch
from torch import Tensor

from precast.ops.providers import reference, sgl_attention, sgl_experts
from precast.ops.providers import sgl_adapters as adapters
from precast.ops.providers.base import Kernel

TIMEOUT_S: Final = 60.0
NAME: Final = "sgl_kernel"
_PROGRAM: Final = f"from {__name__} import try_all; try_all()"
_TOLERANCE: Final = 3e-2
Pair = tuple[Tensor, Tensor]
"""What upstream gives, and what is right."""


@cache
def failures() -> Mapping[str, str]:
    """Our operators that upstream's don't serve on this CPU, each with the reason."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(TRIALS, f"a trial of {NAME} took over {TIMEOUT_S:.0f} s")
    tried = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    ended = f"a trial of {NAME} {_how_it_ended(done)}"
    found = {name: tried.get(name, ended) for name in TRIALS}
    return {name: reason for name, reason in found.items() if reason}


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended with {Signals(-done.returncode).name}: it is built for another CPU"
    lines = done.stderr.strip().splitlines() or ["no result"]
    return f"failed: {lines[-1]}"


def try_all() -> None:
    """The program. Threads would only take time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaded = load()
    for name, trial in TRIALS.items():
        sys.stdout.write(f"{name}\t{loaded or _tried(trial)}\n")
        sys.stdout.flush()  # what comes next may end the process


def load() -> str:
    """Loads the library into this process; why it can't be, or nothing."""
    try:
        importlib.import_module(NAME)
    except (ImportError, OSError) as error:
        return f"{NAME} can't be loaded: {_first_line(error)}"
    return ""


def _tried(trial: Callable[[], Pair]) -> str:
    try:
        actual, expected = trial()
    except (RuntimeError, AttributeError) as error:
        return f"a trial of {NAME} failed: {_first_line(error)}"
    right = torch.allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return "" if right else f"a trial of {NAME} gave a wrong result"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _rms_norm() -> Pair:
    x, weight = torch.randn(3, 96), torch.randn(96)
    return adapters.rms_norm(torch.bfloat16, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)


def _silu() -> Pair:
    x = torch.randn(3, 2 * 96)
    return adapters.silu_and_mul(torch.bfloat16, x), reference.silu_and_mul(x)


def _gelu() -> Pair:
    x = torch.randn(3, 2 * 96)
    return adapters.gelu_tanh_and_mul(torch.bfloat16, x), reference.gelu_tanh_and_mul(x)


def _rotary() -> Pair:
    x, cos, sin = torch.randn(3, 2, 64), torch.rand(3, 32), torch.rand(3, 32)
    return adapters.rotary(torch.bfloat16, x, cos, sin), reference.rotary(x, cos, sin)


def _attention() -> Pair:
    """A prompt of three tokens behind 17, over two blocks, in a window."""
    q, k, v = torch.randn(3, 4, 64), torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    keys, values = torch.randn(2, 2, 16, 2, 64).bfloat16()
    slots, starts, contexts = (
        torch.tensor(numbers, dtype=torch.int32) for numbers in ([17, 18, 19], [0, 3], [20])
    )
    tables = torch.tensor([[0, 1]], dtype=torch.int32)

    def attend(kernel: Kernel) -> Tensor:
        caches = keys.clone().permute(0, 2, 3, 1), values.clone().permute(0, 2, 1, 3)
        out: Tensor = kernel(q, k, v, *caches, slots, starts, contexts, tables, 0.125, 9, 0.0)
        return out

    ours = partial(sgl_attention.paged_attention, False)
    return attend(ours), attend(reference.paged_attention)


def _route() -> Pair:
    scores = torch.randn(3, 8)

    def both(kernel: Kernel) -> Tensor:
        chosen, weights = kernel(scores, 2, True)
        return torch.cat((chosen.float(), weights), dim=1)

    return both(sgl_experts.route), both(reference.route)


TRIALS: Final[Mapping[str, Callable[[], Pair]]] = {
    "rms_norm": _rms_norm,
    "silu_and_mul": _silu,
    "gelu_tanh_and_mul": _gelu,
    "rotary": _rotary,
    "route": _route,
    "paged_attention": _attention,
}
"""By our operators' names; linears and experts need AMX, whatever the library is built for."""

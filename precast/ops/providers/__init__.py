"""Kernel providers: who implements the operators of a step.

The operators' schemas and fakes are ours (``torch.ops.precast.*``), so models and exported graphs
are the same whoever implements them:

* ``native``: our C++ kernels. Graphs call them by symbol.
* ``reference``: plain torch. Slow; for tests, and to find out whether a kernel is to blame.
* ``sgl_kernel``: upstream SGLang's CPU kernels, where they are installed and this CPU runs them.

A process chooses once, at its start, before it packs weights or loads graphs. What a provider can't
serve falls to ``native``, operator by operator, each with a reason. The choice is part of a graph's
key (``provider``, ``provider_abi``).
"""

import warnings
from typing import Final

import torch

from precast.errors import ConfigError
from precast.ops.providers import reference, sgl_kernel, threads
from precast.ops.providers.base import (
    NATIVE,
    OPERATORS,
    Choice,
    Needs,
    Selection,
)
from precast.system.cpu import Cpu, this_cpu

__all__ = [
    "OPERATORS",
    "PROVIDERS",
    "Choice",
    "Needs",
    "Selection",
    "active",
    "described",
    "select",
    "start",
]

PROVIDERS: Final = (NATIVE, reference.NAME, sgl_kernel.NAME)
_NATIVE_SELECTION: Final = Selection(
    wanted=NATIVE, choices={name: Choice(provider=NATIVE) for name in OPERATORS}
)
_active: Selection = _NATIVE_SELECTION
_overrides: torch.library.Library | None = None


def select(wanted: str, needs: Needs, cpu: Cpu | None = None) -> Selection:
    """Who would serve each operator on ``cpu`` (this one); changes nothing. Raises ConfigError."""
    if wanted == NATIVE:
        return _NATIVE_SELECTION
    if wanted == reference.NAME:
        return reference.select()
    if wanted == sgl_kernel.NAME:
        return sgl_kernel.select(needs, cpu or this_cpu())
    raise ConfigError(f"kernel_provider = {wanted}: not one of {', '.join(PROVIDERS)}")


def start(selection: Selection) -> None:
    """Makes this process use the selection, in place of the one before."""
    global _active, _overrides
    if _overrides is not None:
        _overrides._destroy()
        _overrides = None
    if selection.kernels:
        _overrides = torch.library.Library("precast", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden is the point
            for name, kernel in selection.kernels.items():
                _overrides.impl(name, kernel, "CPU", allow_override=True)
    if selection.torch_threads:
        threads.share()
    else:
        threads.take_back()
    _active = selection


def described(selection: Selection) -> dict[str, str]:
    """For each operator its provider and, in brackets, why it is not the one asked for."""
    return {
        name: f"{choice.provider} ({choice.reason})" if choice.reason else choice.provider
        for name, choice in selection.choices.items()
    }


def active() -> Selection:
    """What this process uses."""
    return _active

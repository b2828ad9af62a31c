"""From a part of a step to C++: ``torch.export`` and Inductor, without its build.

The process does nothing but this capture, so what is changed in Inductor here reaches nothing else.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precast.errors import CaptureFailed
from precast.graphs.capture.compiler import inductor_options
from precast.graphs.capture.export import Part
from precast.graphs.targets import TARGETS
from precast.ops import providers
from precast.ops.native import has_adapters


@dataclass(frozen=True, kw_only=True)
class Code:
    """What Inductor writes for a part."""

    wrapper: str
    """AOTInductor's interface, then the calls of kernels and operators in their order."""
    kernels: str
    """The part's own kernels: sums and copies between operators."""
    dispatched: str
    """JSON that describes the operators that are called through torch's dispatcher; empty: none."""


def prepare(isa: str) -> None:
    """Has Inductor generate for ``isa`` and build nothing."""
    _select_target(isa)
    _skip_checks()


def generate(part: Part, isa: str) -> Code:
    """The part's code for a target. Raises CaptureFailed."""
    import torch._inductor
    from torch._inductor import codecache

    made: list[Code] = []

    def keep(graph: Any, wrapper: str, kernels: str, dispatched: str | None, **_: Any) -> list[str]:
        if graph.constants:
            raise CaptureFailed(f"{part.name} has constants: {', '.join(graph.constants)}")
        made.append(Code(wrapper=wrapper, kernels=kernels, dispatched=dispatched or ""))
        return [part.name]

    codecache.AotCodeCompiler.compile = keep  # type: ignore[method-assign,assignment]
    exported = _export(part)
    with torch.no_grad():
        torch._inductor.aot_compile(
            exported.module(), part.inputs, options={**inductor_options(isa), **_direct_calls()}
        )
    return made[0]


def warm_up() -> None:
    """Generates code for next to nothing, for the sake of all that Inductor does only once: it
    takes 1.2 s, three times what a layer takes afterwards."""
    hub: Any = torch.hub
    hub.tqdm.monitor_interval = 0  # else its first progress bar starts a thread
    rows = torch.randn(4, 64)
    part = Part(
        name="warm-up",
        module=_Nothing(),
        inputs=(rows, torch.randn(64)),
        dynamic=({0: torch.export.Dim.DYNAMIC}, None),
        shared=False,
    )
    isa = "x86-64-v3"
    _select_target(isa)
    generate(part, isa)


class _Nothing(torch.nn.Module):
    def forward(self, *flat: Tensor) -> Tensor:
        rows, weight = flat
        normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5) * weight
        return torch.cat([torch.ops.precast.all_reduce(normed), torch.sigmoid(normed)], -1)


def _export(part: Part) -> Any:
    with torch.no_grad():
        # One entry for the module's *args, which holds one for each tensor.
        return torch.export.export(
            part.module, part.inputs, dynamic_shapes=(part.dynamic,), strict=False
        )


def _select_target(isa: str) -> None:
    """Makes Inductor generate for ``isa`` whatever this machine has, and run no compiler probes.

    With simdlen alone it would take the first class of that width that *this* CPU supports, AMX
    included.
    """
    from torch._inductor import cpu_vec_isa

    # AVX-512's would compile and load a program to see whether this CPU has bf16: 0.4 s a capture.
    cpu_vec_isa.VecAVX512.__bool__ = cpu_vec_isa.VecISA.__bool__  # type: ignore[method-assign,assignment]
    name = TARGETS[isa][0]
    chosen = [getattr(cpu_vec_isa, name)()] if name else []
    cpu_vec_isa.valid_vec_isa_list = lambda: chosen  # type: ignore[assignment]


def _skip_checks() -> None:
    """Leaves out the checks of inputs that a debugging variable would switch on: 15 functions full
    of string streams in a layer."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def no_checks(wrapper: Any) -> None:
        wrapper.prefix.splice_aot(
            "static inline void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}\n"
        )

    CppWrapperCpu.generate_input_output_runtime_checks = no_checks  # type: ignore[method-assign]


def _direct_calls() -> dict[str, Any]:
    """Lets graphs call our own kernels by symbol instead of through the dispatcher (``shims.h``).
    Another provider's are called through it, where ``providers.start`` has put them."""

    def shim(name: str, arguments: str) -> list[str]:
        return [f"AOTITorchError aoti_torch_cpu_{name}({arguments}, AtenTensorHandle* ret)"]

    def tensors(names: str) -> str:
        return ", ".join(f"AtenTensorHandle {name}" for name in names.split())

    ops = torch.ops.precast
    tail = ", AtenTensorHandle* bias, int64_t out_features, int64_t format"
    paged = tensors("q k v k_cache v_cache slots query_starts context_lens block_tables")
    shims = {
        ops.embedding.default: shim(
            "embedding", tensors("ids weight") + ", int64_t features, int64_t format"
        ),
        ops.linear.default: shim("linear", tensors("x weight") + tail),
        ops.paged_attention.default: shim(
            "paged_attention",
            paged + ", double scale, int64_t window, double softcap, "
            "const int64_t* groups, int64_t groups_len, AtenTensorHandle* sinks",
        ),
        ops.fused_experts.default: shim(
            "fused_experts",
            tensors("x experts weights gate_up down") + ", int64_t expert_size, int64_t format, "
            "AtenTensorHandle* gate_up_bias, AtenTensorHandle* down_bias, double limit",
        ),
        ops.rms_norm.default: shim("rms_norm", tensors("x weight") + ", double eps"),
        ops.rotary.default: shim("rotary", tensors("x cos sin")),
        ops.silu_and_mul.default: shim("silu_and_mul", tensors("gate_up")),
        ops.gelu_tanh_and_mul.default: shim("gelu_tanh_and_mul", tensors("gate_up")),
        ops.sigmoid_and_mul.default: shim("sigmoid_and_mul", tensors("gate x")),
        ops.soft_cap.default: shim("soft_cap", tensors("x") + ", double cap"),
        ops.route.default: [
            "AOTITorchError aoti_torch_cpu_route(AtenTensorHandle scores, int64_t per_token, "
            "int32_t normalize, AtenTensorHandle* chosen, AtenTensorHandle* weights)"
        ],
        ops.all_reduce.default: shim("all_reduce", tensors("x")),
        ops.all_gather.default: shim(
            "all_gather", tensors("x") + ", const int64_t* widths, int64_t widths_len"
        ),
        ops.broadcast.default: shim("broadcast", tensors("x") + ", int64_t root"),
    }
    selection = providers.active()
    if has_adapters() and selection.is_native("linear"):  # which is a part of it
        parts = ", const int64_t* widths, int64_t widths_len, int64_t format"
        adapted = tensors("x weight") + ", AtenTensorHandle* bias, " + tensors("slots a b") + parts
        shims[ops.adapted_linear.default] = shim("adapted_linear", adapted)
    native = {op: text for op, text in shims.items() if selection.is_native(op._opname)}
    return {"aot_inductor.custom_ops_to_c_shims": native}

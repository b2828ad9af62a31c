"""SGLang's CPU kernels (its package ``sgl_kernel``, built for CPUs) behind our operators.

They take bfloat16 and float16 only, and a check that fails within one of their parallel regions
ends the process. So what they can't serve is found out before: by the CPU's features, by the
operators' schemas, and by the types that the model asks for. Built as upstream builds it the
library needs AVX-512 and stops with SIGILL elsewhere; one that was built for AVX2 has some of the
operators. So where a CPU lacks what upstream builds for, a process of its own tries first
(``sgl_trial.py``).
"""

import importlib
import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch

from precast.ops.packing import Format
from precast.ops.providers import sgl_adapters as adapters
from precast.ops.providers import sgl_attention, sgl_experts, sgl_trial
from precast.ops.providers.base import NATIVE, OPERATORS, Choice, Kernel, Needs, Selection
from precast.system.cpu import Cpu

NAME: Final = sgl_trial.NAME
DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FORMATS: Final = frozenset({Format.BF16, Format.FP16, Format.INT8})
_BUILT_FOR: Final = frozenset({"avx512_bf16", "avx512_vnni"})
"""Beyond x86-64-v4. It has AMX instructions too, but runs those in some operators only."""
_LEAST: Final = frozenset({"avx2", "fma", "f16c"})
_PRODUCTS: Final = ("fused_experts", "linear")
"""Operators that multiply by packed weights, which takes AMX."""

SCHEMAS: Final = {
    "rmsnorm_cpu": "(Tensor input, Tensor weight, float eps) -> Tensor",
    "silu_and_mul_cpu": "(Tensor input) -> Tensor",
    "gelu_tanh_and_mul_cpu": "(Tensor input) -> Tensor",
    "rotary_embedding_cpu": "(Tensor positions, Tensor query, Tensor key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox) -> (Tensor, Tensor)",
    "decode_attention_cpu": "(Tensor query, Tensor k_cache, Tensor v_cahce, Tensor(a!) output, "
    "Tensor? key, Tensor? value, Tensor loc, Tensor attn_logits, Tensor req_to_token, "
    "Tensor req_pool_indices, Tensor seq_lens, float sm_scale, float logit_cap, "
    "bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks) -> ()",
    "extend_attention_cpu": "(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, "
    "Tensor(a!) o_extend, Tensor k_buffer, Tensor v_buffer, Tensor req_to_token, "
    "Tensor req_pool_indices, Tensor seq_lens, Tensor extend_seq_lens, Tensor extend_start_loc, "
    "int max_len_extend, float sm_scale, float logit_cap, bool is_cross_attn, "
    "int sliding_window_size, Tensor? encoder_lens, Tensor? sinks, Tensor? tree_mask=None) -> ()",
    "store_cache_cpu": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(a!) v_cache, "
    "Tensor indices, int? row_dim) -> ()",
    "convert_weight_packed": "(Tensor weight) -> Tensor",
    "weight_packed_linear": "(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> Tensor",
    "int8_scaled_mm_with_quant": "(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor",
    "fused_experts_cpu": "(Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, "
    "Tensor topk_ids, bool inplace, int moe_comp_method, Tensor? w1_scale, Tensor? w2_scale, "
    "Tensor? w1_zero, Tensor? w2_zero, int[]? block_size, Tensor? w1_bias, Tensor? w2_bias, "
    "float? alpha, float? limit, bool is_vnni, str? activation=None) -> Tensor",
    "topk_softmax_cpu": "(Tensor hidden_states, Tensor gating_output, int topk, "
    "bool renormalize, Tensor? correction_bias=None) -> (Tensor, Tensor)",
}
"""What the adapters were written against."""

USES: Final[Mapping[str, tuple[str, ...]]] = {
    "fused_experts": ("convert_weight_packed", "fused_experts_cpu"),
    "gelu_tanh_and_mul": ("gelu_tanh_and_mul_cpu",),
    "linear": ("convert_weight_packed", "weight_packed_linear", "int8_scaled_mm_with_quant"),
    "paged_attention": ("decode_attention_cpu", "extend_attention_cpu", "store_cache_cpu"),
    "rms_norm": ("rmsnorm_cpu",),
    "rotary": ("rotary_embedding_cpu",),
    "route": ("topk_softmax_cpu",),
    "silu_and_mul": ("silu_and_mul_cpu",),
}
"""Upstream's operators behind each of ours."""


def select(needs: Needs, cpu: Cpu) -> Selection:
    reasons = {name: _missing(name, needs, cpu) for name in OPERATORS}
    served = [name for name in OPERATORS if not reasons[name]]
    kernels = _kernels(needs, cpu)
    return Selection(
        wanted=NAME,
        choices={
            name: Choice(provider=NATIVE if reason else NAME, reason=reason)
            for name, reason in reasons.items()
        },
        kernels={name: kernels[name] for name in served},
        pack=adapters.pack if "linear" in served else None,
        pack_experts=sgl_experts.pack if "fused_experts" in served else None,
        token_major_cache="paged_attention" in served,
        rounds=bool(served),
        torch_threads=bool(served),
        version=f"{_library_version()}-{adapters.LAYOUT}" if served else "",
    )


def _library_version() -> str:
    return str(getattr(importlib.import_module(NAME), "__version__", "unknown"))


def _kernels(needs: Needs, cpu: Cpu) -> dict[str, Kernel]:
    dtype = DTYPES.get(needs.weight_dtype, torch.bfloat16)
    return {
        "fused_experts": sgl_experts.fused_experts,
        "gelu_tanh_and_mul": partial(adapters.gelu_tanh_and_mul, dtype),
        "linear": adapters.linear,
        "paged_attention": partial(sgl_attention.paged_attention, cpu.amx),
        "rms_norm": partial(adapters.rms_norm, dtype),
        "rotary": partial(adapters.rotary, dtype),
        "route": sgl_experts.route,
        "silu_and_mul": partial(adapters.silu_and_mul, dtype),
    }


def _missing(operator: str, needs: Needs, cpu: Cpu) -> str:
    """Why upstream can't serve the operator; empty if it can."""
    if operator not in USES:
        return "it has no such operator"
    if reason := _experts_unserved(operator, needs):
        return reason
    if reason := _cpu_lacks(operator, needs, cpu):
        return reason
    if importlib.util.find_spec(NAME) is None:
        return f"{NAME} is not installed"
    failed = "" if _as_built(cpu) else sgl_trial.failures().get(operator, "")
    return failed or _library_lacks(operator) or _unserved(operator, needs)


def _as_built(cpu: Cpu) -> bool:
    """Whether the CPU has all that upstream builds for, AMX aside."""
    return cpu.avx512 and cpu.flags >= _BUILT_FOR


def _cpu_lacks(operator: str, needs: Needs, cpu: Cpu) -> str:
    if lacking := sorted(_LEAST - cpu.flags):
        return f"this CPU has no {', '.join(lacking)}"
    if operator in _PRODUCTS:
        if not (cpu.amx and _as_built(cpu)):
            return "this CPU has no AMX"
        floats = {needs.weight_dtype, *(fmt.name.lower() for fmt in needs.formats)}
        if "fp16" in floats and "amx_fp16" not in cpu.flags:
            return "weights are fp16: this CPU has no amx_fp16"
    return ""


def _library_lacks(operator: str) -> str:
    if failure := sgl_trial.load():
        return failure
    for name in USES[operator]:
        packet: Any = getattr(torch.ops.sgl_kernel, name, None)
        if packet is None:
            return f"{NAME} has no operator {name}"
        found = str(packet.default._schema).partition("::")[2].removeprefix(name)
        if found != SCHEMAS[name]:
            return f"{name} has another schema: {found}"
    return ""


def _unserved(operator: str, needs: Needs) -> str:
    if operator == "paged_attention":
        if needs.kv_dtype != "bf16":
            return f"kv_dtype is {needs.kv_dtype}: it takes bf16"
        if needs.uneven_groups:
            return "this rank's KV heads have different numbers of query heads"
        # Its vectors hold 32 values, and heads are not padded.
        return (
            "" if needs.head_dim % 32 == 0 else f"head_dim is {needs.head_dim}: not 32's multiple"
        )
    if needs.weight_dtype not in DTYPES:
        return f"weight_dtype is {needs.weight_dtype}: it takes {' and '.join(DTYPES)}"
    others = sorted(fmt.name.lower() for fmt in needs.formats - _FORMATS)
    if operator in _PRODUCTS and others:
        return f"weights are {', '.join(others)}: it takes bf16, fp16 and int8"
    return ""


def _experts_unserved(operator: str, needs: Needs) -> str:
    """Why upstream has nothing for the model's experts, whatever the machine."""
    if operator not in ("fused_experts", "route"):
        return ""
    if not needs.experts:
        return "the model has no experts"
    if operator == "route" and needs.experts not in sgl_experts.ROUTED:
        return f"it routes to no {needs.experts} experts"
    if operator == "fused_experts" and needs.limited_experts:
        return "experts have biases and a limit"
    return ""

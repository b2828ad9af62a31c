"""A stand-in for SGLang's CPU kernels: upstream's operators, schemas and quirks in plain torch.

Not installed: tests put its folder on PYTHONPATH. What upstream checks, this checks; what would end
the process there, read beyond a tensor or give a wrong result, is an AssertionError here.
Undeclared mutation, aliases and arguments that upstream ignores are kept. True to upstream's commit
7f8f0300 of August 2026, which was run beside it.
"""

import torch
from torch import Tensor

__version__ = "0.4.6.post1"
TILE_N, TILE_K = 16, 32
INT8_TILE_N = 32
ROUTED = (1, 2, 4, 8, 16, 32, 64, 128, 160, 256, 384, 512)
FLOATS = (torch.bfloat16, torch.float16)
_library = torch.library.Library("sgl_kernel", "DEF")


def _operator(schema: str):  # type: ignore[no-untyped-def]
    def register(function):  # type: ignore[no-untyped-def]
        _library.define(schema)
        _library.impl(schema.partition("(")[0], function, "CPU")
        return function

    return register


def _check_float(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype in FLOATS, f"not implemented for {tensor.dtype}"
        assert tensor.dtype == tensors[0].dtype, "types differ"
        assert tensor.stride(-1) == 1


@_operator("rmsnorm_cpu(Tensor input, Tensor weight, float eps) -> Tensor")
def rmsnorm_cpu(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_float(input, weight)
    assert input.dim() == 2 and weight.shape == input.shape[1:]
    x = input.float()
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * scale * weight.float()).to(input.dtype)


@_operator("silu_and_mul_cpu(Tensor input) -> Tensor")
def silu_and_mul_cpu(input: Tensor) -> Tensor:
    _check_float(input)
    assert input.is_contiguous()
    gate, up = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


@_operator("gelu_tanh_and_mul_cpu(Tensor input) -> Tensor")
def gelu_tanh_and_mul_cpu(input: Tensor) -> Tensor:
    _check_float(input)
    assert input.is_contiguous()
    gate, up = input.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(input.dtype)


@_operator(
    "rotary_embedding_cpu(Tensor positions, Tensor query, Tensor key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox) -> (Tensor, Tensor)"
)
def rotary_embedding_cpu(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, neox: bool
) -> tuple[Tensor, Tensor]:
    """2-D: in place, and what is returned aliases what was given."""
    _check_float(query, key, cos_sin_cache)
    assert positions.dtype == torch.int64 and query.dim() == key.dim() == 2 and neox
    assert positions.numel() == query.shape[0] == key.shape[0]
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    for tensor in (query, key):
        assert tensor.shape[1] % head_size == 0
        heads = tensor.view(tensor.shape[0], tensor.shape[1] // head_size, head_size)
        first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
        heads[..., :half] = (first * cos - second * sin).to(tensor.dtype)
        heads[..., half : 2 * half] = (second * cos + first * sin).to(tensor.dtype)
    return query, key


@_operator(
    "store_cache_cpu(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(a!) v_cache, Tensor indices, "
    "int? row_dim) -> ()"
)
def store_cache_cpu(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, row_dim: int | None
) -> None:
    for tensor in (k, v, k_cache, v_cache):
        assert tensor.dim() == 3 and tensor.dtype == k.dtype
        assert tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    assert indices.shape == k.shape[:1] and indices.is_contiguous()
    assert indices.dtype in (torch.int32, torch.int64)
    assert not len(indices) or 0 <= int(indices.min()) <= int(indices.max()) < len(k_cache)
    k_cache[indices], v_cache[indices] = k, v


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [T, heads, D], the last tokens of keys and values [C, kv_heads, D]. A window counts the
    query's own token; 0 is none."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("thd,chd->htc", q.float(), keys) * scale
    if cap > 0:
        scores = torch.tanh(scores / cap) * cap
    context = len(keys)
    behind = torch.arange(context - len(q), context)[:, None] - torch.arange(context)[None]
    hidden = behind < 0
    if window > 0:
        hidden |= behind >= window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        assert sinks.dtype == q.dtype and sinks.shape == q.shape[1:2]
        column = sinks.float()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., :context]
    return torch.einsum("htc,chd->thd", weights, values).to(q.dtype)


def _check_paging(req_to_token: Tensor, indices: Tensor, lengths: Tensor, tokens: int) -> None:
    assert req_to_token.dtype in (torch.int32, torch.int64) and req_to_token.dim() == 2
    assert indices.dtype == lengths.dtype == torch.int64 and indices.shape == lengths.shape
    for index, length in zip(indices.tolist(), lengths.tolist(), strict=True):
        assert 0 <= index < len(req_to_token) and 0 < length <= req_to_token.shape[1]
        slots = req_to_token[index, :length]
        assert 0 <= int(slots.min()) <= int(slots.max()) < tokens


@_operator(
    "decode_attention_cpu(Tensor query, Tensor k_cache, Tensor v_cahce, Tensor(a!) output, "
    "Tensor? key, Tensor? value, Tensor loc, Tensor attn_logits, Tensor req_to_token, "
    "Tensor req_pool_indices, Tensor seq_lens, float sm_scale, float logit_cap, "
    "bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks) -> ()"
)
def decode_attention_cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cahce: Tensor,
    output: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor,
    attn_logits: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Writes key and value into the caches too, which the schema doesn't say."""
    _check_float(query, k_cache, v_cahce, output)
    rows, heads, dim = query.shape
    assert query.is_contiguous() and k_cache.dim() == v_cahce.dim() == 3 and dim % 32 == 0
    assert attn_logits.dtype == torch.float32 and loc.dtype == torch.int64
    assert attn_logits.shape == (rows, heads, 8, dim + 1) and loc.shape == (rows,)
    assert not is_cross_attn and encoder_lens is None
    if key is not None and value is not None:
        store_cache_cpu(key, value, k_cache, v_cahce, loc, None)
    _check_paging(req_to_token, req_pool_indices, seq_lens, len(k_cache))
    attn_logits.zero_()  # scratch
    for row, (index, length) in enumerate(
        zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
    ):
        slots = req_to_token[index, :length].long()
        output[row] = _attend(
            query[row : row + 1],
            k_cache[slots],
            v_cahce[slots],
            sm_scale,
            logit_cap,
            sliding_window_size,
            sinks,
        )[0]


@_operator(
    "extend_attention_cpu(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, "
    "Tensor(a!) o_extend, Tensor k_buffer, Tensor v_buffer, Tensor req_to_token, "
    "Tensor req_pool_indices, Tensor seq_lens, Tensor extend_seq_lens, Tensor extend_start_loc, "
    "int max_len_extend, float sm_scale, float logit_cap, bool is_cross_attn, "
    "int sliding_window_size, Tensor? encoder_lens, Tensor? sinks, Tensor? tree_mask=None) -> ()"
)
def extend_attention_cpu(
    q_extend: Tensor,
    k_extend: Tensor | None,
    v_extend: Tensor | None,
    o_extend: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_seq_lens: Tensor,
    extend_start_loc: Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None = None,
) -> None:
    """The prefix comes out of the buffers, the new tokens out of k_extend and v_extend. logit_cap
    is ignored."""
    assert k_extend is not None and v_extend is not None and not is_cross_attn
    _check_float(q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer)
    assert extend_seq_lens.dtype == extend_start_loc.dtype == req_to_token.dtype
    assert max_len_extend == int(extend_seq_lens.max())
    _check_paging(req_to_token, req_pool_indices, seq_lens, len(k_buffer))
    for index, length, count, begin in zip(
        req_pool_indices.tolist(),
        seq_lens.tolist(),
        extend_seq_lens.tolist(),
        extend_start_loc.tolist(),
        strict=True,
    ):
        prefix = req_to_token[index, : length - count].long()
        new = slice(begin, begin + count)
        keys = torch.cat((k_buffer[prefix], k_extend[new]))
        values = torch.cat((v_buffer[prefix], v_extend[new]))
        o_extend[new] = _attend(
            q_extend[new], keys, values, sm_scale, 0.0, sliding_window_size, sinks
        )


def _swap(weight: Tensor) -> Tensor:
    """An involution that stands for the packed layout: nothing reads a packed weight plainly."""
    return weight.flip(0).contiguous()


@_operator("convert_weight_packed(Tensor weight) -> Tensor")
def convert_weight_packed(weight: Tensor) -> Tensor:
    """int8: with the int32 sum of each row's values times 128 behind it."""
    assert weight.dim() == 2 and weight.is_contiguous()
    assert weight.shape[0] % TILE_N == 0 and weight.shape[1] % TILE_K == 0
    if weight.dtype == torch.int8:
        assert weight.shape[0] % INT8_TILE_N == 0
        sums = (weight.sum(1, dtype=torch.int32) * 128).view(-1, 1).view(torch.int8)
        weight = torch.cat((weight, sums), dim=1)
    else:
        assert weight.dtype in FLOATS
    return _swap(weight)


@_operator("weight_packed_linear(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> Tensor")
def weight_packed_linear(mat1: Tensor, mat2: Tensor, bias: Tensor | None, vnni: bool) -> Tensor:
    _check_float(mat1, mat2)
    assert vnni and mat1.dim() == 2 and mat1.shape[1] == mat2.shape[1] and len(mat1) > 0
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == mat2.shape[:1])
    y = mat1.float() @ _swap(mat2).float().T
    return (y if bias is None else y + bias).to(mat1.dtype)


@_operator(
    "int8_scaled_mm_with_quant(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor"
)
def int8_scaled_mm_with_quant(
    mat1: Tensor,
    mat2: Tensor,
    scales2: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    vnni: bool,
) -> Tensor:
    """Rounds each row of mat1 to 8 bits first. float16 is in the schema alone."""
    assert mat1.dtype == out_dtype == torch.bfloat16 and vnni
    assert mat1.dim() == 2 and len(mat1) > 0
    assert mat2.dtype == torch.int8 and scales2.dtype == torch.float32
    assert mat2.shape[1] == mat1.shape[1] + 4 and scales2.shape == mat2.shape[:1]
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == mat2.shape[:1])
    steps, step_scales = _rounded(mat1)
    y = (steps.double() @ _swap(mat2)[:, :-4].double().T).float() * step_scales * scales2
    return (y if bias is None else y + bias).to(out_dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 steps [M, K] and their float32 scales [M, 1]."""
    largest = x.float().abs().amax(1, keepdim=True).clamp(min=1e-7)
    return (x.float() * (127 / largest)).round().to(torch.int8), largest / 127


@_operator(
    "topk_softmax_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, "
    "Tensor? correction_bias=None) -> (Tensor, Tensor)"
)
def topk_softmax_cpu(
    hidden: Tensor, gating: Tensor, topk: int, renormalize: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    assert gating.is_contiguous() and len(hidden) == len(gating) and bias is None
    assert gating.shape[1] in ROUTED, f"Unexpected num_experts: {gating.shape[1]}"
    weights, chosen = gating.float().softmax(-1).topk(topk, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), chosen.int()


@_operator(
    "fused_experts_cpu(Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, "
    "Tensor topk_ids, bool inplace, int moe_comp_method, Tensor? w1_scale, Tensor? w2_scale, "
    "Tensor? w1_zero, Tensor? w2_zero, int[]? block_size, Tensor? w1_bias, Tensor? w2_bias, "
    "float? alpha, float? limit, bool is_vnni, str? activation=None) -> Tensor"
)
def fused_experts_cpu(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    inplace: bool,
    moe_comp_method: int,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    w1_zero: Tensor | None,
    w2_zero: Tensor | None,
    block_size: list[int] | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    alpha: float | None,
    limit: float | None,
    is_vnni: bool,
    activation: str | None = None,
) -> Tensor:
    """What lies between gate and up, and down, is rounded to hidden_states' type, so is what each
    expert gives. With biases the operator forgets those of gate and up where rows are few."""
    assert is_vnni and not inplace and activation is None
    assert all(x is None for x in (w1_zero, w2_zero, block_size, w1_bias, w2_bias, alpha, limit))
    assert all(x.is_contiguous() for x in (hidden_states, w1, w2, topk_weights, topk_ids))
    assert topk_ids.dtype == torch.int32 and topk_weights.dtype == torch.float32
    assert topk_ids.shape == topk_weights.shape and len(topk_ids) == len(hidden_states) > 0
    size, hidden = w1.shape[1] // 2, hidden_states.shape[1]
    behind = 4 if moe_comp_method == 1 else 0
    assert w1.shape[2] == hidden + behind and w2.shape == (len(w1), hidden, size + behind)
    assert size % INT8_TILE_N == 0 and hidden % INT8_TILE_N == 0
    out = torch.zeros(hidden_states.shape)
    for token, (ids, likes) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
        for expert, like in zip(ids, likes, strict=True):
            scales = [s if s is None else s.view(len(w1), -1)[expert] for s in (w1_scale, w2_scale)]
            row = hidden_states[token : token + 1]
            gate_up = _expert_linear(row, w1[expert], scales[0], bool(behind))
            inner = torch.nn.functional.silu(gate_up[:, :size]) * gate_up[:, size:]
            inner = inner.to(hidden_states.dtype)
            y = _expert_linear(inner, w2[expert], scales[1], bool(behind)) * like
            out[token] += y[0].to(hidden_states.dtype).float()
    return out.to(hidden_states.dtype)


def _expert_linear(x: Tensor, weight: Tensor, scales: Tensor | None, rounds: bool) -> Tensor:
    _check_float(x)
    if not rounds:
        assert weight.dtype == x.dtype and scales is None
        return x.float() @ _swap(weight).float().T
    assert weight.dtype == torch.int8 and scales is not None and scales.dtype == torch.float32
    steps, own = _rounded(x)
    return (steps.float() @ _swap(weight)[:, :-4].float().T) * own * scales

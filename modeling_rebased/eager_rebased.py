# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""Compute ReBased attention in plain PyTorch, on any device, with any autograd feature, in O(T) time.

The kernel is a polynomial of degree two in the scaled dot product (Aksenov et al., 2024, section 4):

    s_ij = (q_i . k_j) * scale,   w_ij = c0 + c1 s_ij + c2 s_ij**2   for j <= i,
    o_i = sum_j w_ij v_j / (sum_j w_ij + eps).

`w` is an inner product of feature maps, so the sum over all earlier chunks is one matrix, the state. Only the tokens
of one chunk meet each other pairwise.

With a decay, w_ij is multiplied by exp(G_i - G_j), where G_i is the sum of `log_decay` up to token i. Only differences
between a token and an earlier one are exponentiated, so no exponent is positive.
"""

import contextlib
import functools
import itertools
import math

import torch

from .configuration_rebased import feature_blocks, n_features


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Return whether nobody traces, fakes or intercepts what is done with these tensors."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors if x is not None)
    )


def _pairs(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a, b and the factor of the features x_a x_b, in their order."""
    diagonal = torch.arange(size, device=device)
    row, column = torch.triu_indices(size, size, 1, device=device)
    weight = torch.ones(size + row.shape[0], device=device, dtype=torch.float64)
    weight[size:] = math.sqrt(2)
    return torch.cat([diagonal, row]), torch.cat([diagonal, column]), weight


def _selectors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices [size, pairs] that select x_a and x_b times its factor from x."""
    left, right, weight = _pairs(size, device)
    identity = torch.eye(size, dtype=dtype, device=device)
    return identity[:, left], identity[:, right] * weight.to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_selectors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # also fit for training, wherever they are made first
        return _selectors(size, dtype, device)


def feature_map(x: torch.Tensor, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """Return the features phi(x) whose inner products make up the kernel, in the layout of the recurrent state.

    In this order: `x_a * x_a` for every a; `sqrt(2) * x_a * x_b` for a < b, lexicographically (both only if c2 != 0);
    `x_a` for every a (only if c1 != 0); 1 (only if c0 != 0). Neither scale nor coefficients enter here: the query side
    carries them.

    Args:
        x (`torch.Tensor`): [..., F], float32 or float64.
        coefficients (`tuple[float, float, float]`): (c0, c1, c2); only whether each is zero matters.

    Returns:
        `torch.Tensor`: [..., n_features(F, coefficients)].
    """
    c0, c1, c2 = coefficients
    size = x.shape[-1]
    features = []
    if c2:
        if torch.compiler.is_exporting():  # torch.export cannot prove sizes of a product whose length is a symbol
            left, right, weight = _pairs(size, x.device)
            features.append(x[..., left] * (x[..., right] * weight.to(x.dtype)))
        else:
            # Selecting columns by a 0/1 matrix is exact, and unlike a gather its backward pass is a matmul too: fast
            # and deterministic.
            make = _kept_selectors if is_plain(x) else _selectors
            left, right = make(size, x.dtype, x.device)
            features.append((x @ left) * (x @ right))
    if c1:
        features.append(x)
    if c0:
        features.append(torch.ones_like(x[..., :1]))
    return features[0] if len(features) == 1 else torch.cat(features, dim=-1)


def _weigh_features(
    features: torch.Tensor,
    feature_dim: int,
    coefficients: tuple[float, float, float],
    weights: tuple[torch.Tensor | float, ...],
) -> torch.Tensor:
    """Return phi(q) times the kernel's coefficients. `weights` (c0, c1, c2) may vary by query: tensors [..., 1]."""
    if sum(map(bool, coefficients)) == 1:
        weight = next(w for c, w in zip(coefficients, weights) if c)
        return features if isinstance(weight, float) and weight == 1.0 else features * weight
    present = [w for c, w in zip(reversed(coefficients), reversed(weights)) if c]
    blocks = features.split(feature_blocks(feature_dim, coefficients), dim=-1)
    return torch.cat([block * weight for block, weight in zip(blocks, present)], dim=-1)


def _power_of_two_below(x: torch.Tensor) -> torch.Tensor:
    """Return the largest power of two <= x, elementwise, for normal float32 or float64 x > 0."""
    if torch.compiler.is_exporting():  # ONNX has no reinterpretation of bits
        return torch.exp2(torch.floor(torch.log2(x)))
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def units_of(largest: torch.Tensor) -> torch.Tensor:
    """Return powers of two, elementwise, that bring finite numbers of the size `largest` to a few units at most.

    They are never above 1, so small numbers stay as they are, and never below the dtype's smallest normal number.
    """
    return _power_of_two_below(largest.clamp(1.0, 1.0 / torch.finfo(largest.dtype).tiny).reciprocal())


def degree_factors(
    key_factor: torch.Tensor, coefficients: tuple[float, float, float], feature_dim: int
) -> torch.Tensor:
    """Return what multiplies the rows of a state, [B, H_kv, features, 1], whose keys `key_factor` multiplies.

    It is the keys' factor [B, H_kv, 1, 1] to the power of the row's degree.
    """
    degrees = [degree for degree, c in zip((2, 1, 0), reversed(coefficients)) if c]
    factors = [
        (key_factor**degree).expand(-1, -1, size, -1)
        for degree, size in zip(degrees, feature_blocks(feature_dim, coefficients))
    ]
    return torch.cat(factors, dim=2)


def naive_rebased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0),
    scale: float | None = None,
    eps: float = 1e-12,
    attention_mask: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the definition, quadratic in T, with one line per formula: the oracle for every other implementation.

    Args:
        q (`torch.Tensor`): [B, T, H_q, F].
        k (`torch.Tensor`): [B, T, H_kv, F].
        v (`torch.Tensor`): [B, T, H_kv, D].
        coefficients, scale, eps, attention_mask, log_decay: as in `rebased_attention`.

    Returns:
        `torch.Tensor`: [B, T, H_q, D] in q's dtype, computed in q's dtype.
    """
    c0, c1, c2 = coefficients
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    s = torch.einsum("bihf,bjhf->bhij", q, k) * scale
    w = (c0 + c1 * s + c2 * s**2).tril()
    if log_decay is not None:
        if attention_mask is not None:
            log_decay = log_decay * attention_mask[..., None].to(log_decay.dtype)
        total = log_decay.to(w.dtype).cumsum(1).transpose(1, 2).repeat_interleave(groups, dim=1)  # [B, H_q, T]
        w = w * (total[..., :, None] - total[..., None, :]).clamp_max(0.0).exp()
    if attention_mask is not None:
        w = w * attention_mask[:, None, None, :].to(w.dtype)
    return torch.einsum("bhij,bjhd->bihd", w, v) / (w.sum(-1).transpose(1, 2)[..., None] + eps)


def computation_dtype(q: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums and states: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context that keeps a mixed-precision region from turning float32 sums into bfloat16 ones."""
    # Tensors on the meta device have shapes only. PyTorch has no autocast for them.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _chunk_size(features: int) -> int:
    """Return how many tokens meet pairwise: per token, pairs cost O(chunk) and the state O(features / chunk)."""
    chunk = 64
    while chunk < features // 8:
        chunk *= 2
    return chunk


def eager_rebased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    log_decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute ReBased attention chunk by chunk. The arguments are those of `rebased_attention`, already checked.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: output [B, T, H_q, D] in q's dtype and, if asked for, the state
        [B or N, H_kv, n_features, D + 1] after the last token in the computation's dtype.
    """
    with without_autocast(q.device):
        compute = functools.partial(
            _chunked, coefficients=coefficients, scale=scale, eps=eps, output_final_state=output_final_state
        )
        if cu_seqlens is None:
            return compute(q, k, v, log_decay, attention_mask, segment_ids, initial_state)
        if initial_state is None and not output_final_state:
            return compute(q, k, v, log_decay, attention_mask, segment_ids_of(cu_seqlens, q.shape[1]), None)
        # Packed sequences that bring or leave states are computed one after another.
        if initial_state is None:
            shape = (cu_seqlens.shape[0] - 1, k.shape[2], n_features(k.shape[3], coefficients), v.shape[3] + 1)
            initial_state = q.new_zeros(shape, dtype=computation_dtype(q))
        outputs, states = [], list(initial_state.split(1))
        for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            if stop > start:
                part = slice(start, stop)
                mask = attention_mask[:, part] if attention_mask is not None else None
                decay = log_decay[:, part] if log_decay is not None else None
                output, states[i] = compute(q[:, part], k[:, part], v[:, part], decay, mask, None, states[i])
                outputs.append(output)
        return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None


def segment_ids_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Return the number of the packed sequence that each of `length` tokens belongs to, int64 [1, length]."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)[None]


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`eager_rebased_attention`, a block of chunks at a time: what is larger than an input exists for one block."""
    batch, length, q_heads, feature_dim = q.shape
    kv_heads, head_dim = k.shape[2], v.shape[3]
    dtype = computation_dtype(q)
    features = n_features(feature_dim, coefficients)

    chunk = _chunk_size(features)
    if torch.compiler.is_exporting():
        # The length may be a symbol, on which nothing may be decided: all chunks are worked on at once.
        with_state, parts = True, [slice(0, length)]
    else:
        if length <= 4 * chunk:
            chunk = length
        with_state = initial_state is not None or output_final_state or length > chunk
        # Chunks that are worked on at once: enough to keep the device busy, few enough to keep memory small.
        block = length
        if with_state:
            block = chunk * max(1, min(64, 2**26 // max(1, batch * q_heads * chunk * features)))
        parts = [slice(start, min(start + block, length)) for start in range(0, length, block)]

    # s**2 of large but finite inputs can exceed the dtype's range although o does not. Multiplying w and eps by the
    # same r**2 > 0 leaves o as it is, so r, a power of two for exactness, brings |r s| to at most 1. It is the
    # product of a factor of each query row (in the block) and this one of each head's keys.
    with torch.no_grad():
        key_max = torch.maximum(k.amax((1, 3)), -k.amin((1, 3))).to(dtype)[..., None, None]  # [B, H_kv, 1, 1]
        key_factor = units_of(key_max)
    # The same change of units for the rows of the state: the keys' factor to the power of the row's degree.
    state_factor = degree_factors(key_factor, coefficients, feature_dim)  # [B, H_kv, features, 1]

    state = None
    if initial_state is not None:
        state = initial_state.to(dtype) * state_factor
    elif with_state:
        state = torch.zeros(batch, kv_heads, features, head_dim + 1, dtype=dtype, device=q.device)
    last_segment = segment_ids[:, :1] if segment_ids is not None else None

    # Without gradients each block writes its part of the output; a graph of such writes would cost O(T) per block.
    output = None if torch.is_grad_enabled() else q.new_empty(batch, length, q_heads, head_dim)
    outputs = []
    for part in parts:
        out, state = _block(
            q[:, part],
            k[:, part],
            v[:, part],
            log_decay[:, part] if log_decay is not None else None,
            coefficients,
            scale,
            eps,
            key_factor,
            attention_mask[:, part] if attention_mask is not None else None,
            segment_ids[:, part] if segment_ids is not None else None,
            last_segment,
            state,
            chunk,
        )
        if segment_ids is not None:
            last_segment = segment_ids[:, part][:, -1:]
        if output is None:
            outputs.append(out.to(q.dtype))
        else:
            output[:, part] = out
    if output is None:
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output, state / state_factor if output_final_state else None


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    key_factor: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    last_segment: torch.Tensor | None,
    state: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute N chunks of C tokens at once, and return [B, T, H_q, D] and the state after them.

    Args:
        q, k, v: [B, T, H_q, F], [B, T, H_kv, F] and [B, T, H_kv, D], where T is at most N * C.
        log_decay: [B, T, H_kv], or `None`.
        key_factor: [B, H_kv, 1, 1].
        last_segment: [B, 1], the segment that the state belongs to.
        state: [B, H_kv, features, D + 1] before the block, in units of the factor. It is `None` if nothing comes
            before or after.
    """
    batch, length, q_heads, feature_dim = q.shape
    kv_heads, head_dim = k.shape[2], v.shape[3]
    groups = q_heads // kv_heads
    dtype = key_factor.dtype
    c0, c1, c2 = coefficients
    exporting = torch.compiler.is_exporting()
    n_chunks = length // chunk + 2 if exporting else -(-length // chunk)
    tokens = torch.arange(n_chunks, device=q.device)[:, None] * chunk + torch.arange(chunk, device=q.device)  # [N, C]

    def cut(x: torch.Tensor) -> torch.Tensor:
        """[B, T, *] -> [B, N, C, *], with copies of the last token after the end."""
        if exporting:  # where how much is to be added may not be decided, and no sizes compared
            return x[:, tokens.clamp_max(length - 1)]
        padding = n_chunks * chunk - length
        if padding:
            x = torch.cat([x, x[:, -1:].expand(-1, padding, *x.shape[2:])], dim=1)
        return x.unflatten(1, (n_chunks, chunk))

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, *] -> [B, H, N, C, *]"""
        return cut(x).movedim(3, 1)

    # The query heads of one key-value head stand beside each other, as more rows: [B, H_kv, N, C * G, F].
    q_c = chunks((q.to(dtype) * scale).unflatten(2, (kv_heads, groups))).flatten(3, 4)
    k_c = chunks(k.to(dtype)) * key_factor[:, :, None]  # [B, H_kv, N, C, F]
    # The column of ones becomes the normaliser, and a key that is dropped or stands after the end is a row of zeros.
    values = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], dim=-1)
    if attention_mask is not None:
        values = values * attention_mask[:, :, None, None].to(dtype)
    v_c = chunks(values)  # [B, H_kv, N, C, D + 1]
    if exporting or n_chunks * chunk > length:
        v_c = v_c * (tokens < length)[..., None].to(dtype)

    with torch.no_grad():
        query_max = q_c.abs().amax(-1, keepdim=True) * feature_dim  # [B, H_kv, N, C * G, 1]
        query_factor = units_of(query_max)
        factor = query_factor * key_factor[:, :, None]
        weights = (c0 * factor**2, c1 * factor, c2)
        row_eps = (eps * factor**2).clamp_min(torch.finfo(dtype).tiny)
    q_c = q_c * query_factor

    # Within a chunk, pairwise: [B, H_kv, N, C * G, C].
    s = q_c @ k_c.transpose(-1, -2)
    w = c2 * s.square()
    if c1:
        w = w + weights[1] * s
    if c0:
        w = w + weights[0]
    if log_decay is not None:
        log_decay = chunks(log_decay.to(dtype)[..., None]).squeeze(-1)  # [B, H_kv, N, C]
        if exporting or n_chunks * chunk > length:
            log_decay = log_decay * (tokens < length).to(dtype)
        total = log_decay.cumsum(-1)
        query_total = total.repeat_interleave(groups, dim=-1)[..., None]  # [B, H_kv, N, C * G, 1]
        w = w * (query_total - total[..., None, :]).clamp_max(0.0).exp()
    allowed = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if segment_ids is not None:
        segments = cut(segment_ids)  # [B, N, C]
        allowed = (allowed & (segments[:, :, :, None] == segments[:, :, None, :]))[:, None]  # [B, 1, N, C, C]
    w = w * allowed.repeat_interleave(groups, dim=-2).to(dtype)
    out = w @ v_c  # [B, H_kv, N, C * G, D + 1]

    if state is not None:
        # Across chunks: the state before each chunk is the sum of what the chunks before it add. The sum over chunks
        # is a product with a triangle of ones; the carried state counts as chunk number -1.
        adds = v_c
        before = torch.ones(n_chunks + 1, n_chunks + 1, dtype=dtype, device=q.device).tril()
        if segment_ids is not None:
            last = segments[:, :, -1]  # [B, N]
            adds = v_c * (segments == last[..., None])[:, None, ..., None].to(dtype)
            last = torch.cat([last_segment, last], dim=1)
            before = (before * (last[:, :, None] == last[:, None, :]).to(dtype))[:, None]  # [B, 1, N + 1, N + 1]
        if log_decay is not None:
            adds = adds * (total[..., -1:] - total).exp()[..., None]  # what is left at the end of the chunk
            ends = torch.nn.functional.pad(total[..., -1].cumsum(-1), (1, 0))  # [B, H_kv, N + 1]
            before = before * (ends[..., :, None] - ends[..., None, :]).clamp_max(0.0).exp()
        update = feature_map(k_c, coefficients).transpose(-1, -2) @ adds  # [B, H_kv, N, features, D + 1]
        states = before @ torch.cat([state[:, :, None], update], dim=2).flatten(3)
        states = states.unflatten(3, update.shape[3:])
        q_features = _weigh_features(feature_map(q_c, coefficients), feature_dim, coefficients, weights)
        from_state = q_features @ states[:, :, :-1]
        if log_decay is not None:
            from_state = from_state * query_total.exp()
        if segment_ids is not None:
            reached = (segments == last[:, :-1, None])[:, None, ..., None]  # [B, 1, N, C, 1]
            from_state = from_state * reached.repeat_interleave(groups, dim=-2).to(dtype)
        out = out + from_state
        state = states[:, :, -1]

    out = out[..., :-1] / (out[..., -1:] + row_eps)
    out = out.unflatten(3, (chunk, groups))  # [B, H_kv, N, C, G, D]
    if exporting:
        position = torch.arange(length, device=q.device)
        out = out[:, :, position // chunk, position % chunk]
    else:
        out = out.flatten(2, 3)[:, :, :length]  # [B, H_kv, T, G, D]
    return out.transpose(1, 2).reshape(batch, length, q_heads, head_dim), state


def eager_rebased_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute one token: the query reads the state and the token itself, then `state += phi(k) [v, 1]^T` in place.

    With a decay the state is multiplied by exp(log_decay) first.

    Args:
        q (`torch.Tensor`): [B, 1, H_q, F].
        k (`torch.Tensor`): [B, 1, H_kv, F].
        v (`torch.Tensor`): [B, 1, H_kv, D].
        state (`torch.Tensor`): float32 or float64 [B, H_kv, n_features, D + 1]; changed in place.
        coefficients, scale, eps, attention_mask, state_indices, log_decay: as in `rebased_attention_decode`.

    Returns:
        `torch.Tensor`: [B, 1, H_q, D] in q's dtype.
    """
    batch, _, kv_heads, feature_dim = k.shape
    head_dim, dtype = v.shape[3], state.dtype
    c0, c1, c2 = coefficients
    with without_autocast(q.device):
        queries = q.reshape(batch, kv_heads, -1, feature_dim).to(dtype) * scale  # [B, H_kv, G, F]
        keys = k.reshape(batch, kv_heads, 1, feature_dim).to(dtype)
        values = v.reshape(batch, kv_heads, 1, head_dim).to(dtype)
        values = torch.cat([values, values.new_ones(batch, kv_heads, 1, 1)], dim=-1)
        if attention_mask is not None:
            values = values * attention_mask[:, :, None, None].to(dtype)
        # As in `_block`, a factor of each query row keeps the product with large keys, which the state may hold, in
        # the dtype's range. Keys need none: their squares are in the state, so they are in its range.
        factor = units_of(torch.linalg.vector_norm(queries, 1, dim=-1, keepdim=True))  # [B, H_kv, G, 1]
        queries = queries * factor
        weights = (c0 * factor.square() if c0 else 0.0, c1 * factor if c1 else 0.0, c2)
        # The token's own weight by its formula: as a sum of products of features it is less exact where it is small.
        s = (queries * keys).sum(-1, keepdim=True)  # [B, H_kv, G, 1]
        weight = s.square() if c2 == 1 else c2 * s.square()
        if c1:
            weight = weight + weights[1] * s
        if c0:
            weight = weight + weights[0]
        # The features of all queries and of the key at once: every operator costs time, however small the tensor.
        features = feature_map(torch.cat([queries, keys], dim=2), coefficients)
        q_features, k_features = features.split((queries.shape[2], 1), dim=2)
        q_features = _weigh_features(q_features, feature_dim, coefficients, weights)
        k_features = k_features.transpose(2, 3)  # [B, H_kv, features, 1]
        before = state
        if state_indices is not None:
            slots = state_indices.clamp_min(0).long()  # a row without a slot reads slot 0 and adds nothing to it
            has_slot = (state_indices >= 0)[:, None, None, None]
        if log_decay is not None:
            decay = log_decay.reshape(batch, kv_heads, 1, 1).to(dtype)
            if state_indices is not None:  # 0 for the slots of others
                decay = state.new_zeros(*state.shape[:2], 1, 1).index_add_(0, slots, decay.where(has_slot, 0.0))
            state.mul_(decay.exp())
        if state_indices is not None:
            before = state[slots]
        sums = torch.addcmul(q_features @ before, weight, values)  # [B, H_kv, G, D + 1]
        numerator, normaliser = sums.split((head_dim, 1), dim=-1)
        # eps in the units of the weights. Where these make it 0, the smallest number keeps 0 / 0 away.
        normaliser = torch.addcmul(normaliser, factor, factor, value=eps)
        out = numerator / (normaliser + torch.finfo(dtype).tiny)
        if state_indices is None:
            state.addcmul_(k_features, values)
        else:
            state.index_add_(0, slots, (k_features * values).where(has_slot, 0.0))
            out = out.where(has_slot, 0.0)
    return out.reshape(batch, 1, -1, head_dim).to(q.dtype)

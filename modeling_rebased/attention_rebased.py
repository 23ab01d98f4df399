# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""ReBased attention: the one public function, its checks, and the choice of a backend."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .configuration_rebased import MAX_FEATURE_DIM, MAX_HEAD_DIM, n_features
from .eager_rebased import computation_dtype, eager_rebased_attention, eager_rebased_decode, is_plain
from .triton_rebased import triton_rebased_attention, triton_rebased_decode, triton_unavailable_reason


BACKENDS = ("auto", "eager", "triton")


class Backend(NamedTuple):
    """Hold the two functions of an implementation: `attention` for whole sequences, `decode` for one token."""

    attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    decode: Callable[..., torch.Tensor]


EAGER = Backend(eager_rebased_attention, eager_rebased_decode)
TRITON = Backend(triton_rebased_attention, triton_rebased_decode)


def choose_backend(backend: str, q: torch.Tensor, v: torch.Tensor, decays: bool = False) -> Backend:
    """Return the implementation for queries and keys like `q` and values like `v`, with a decay if `decays`.

    "auto" is Triton where the tensors are on a GPU and the kernels can run, else eager.

    Raises:
        `ValueError`: `backend` is not one of "auto", "eager", "triton".
        `RuntimeError`: "triton" was asked for and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, but got {backend!r}.")
    if backend == "eager" or (backend == "auto" and not q.is_cuda):
        return EAGER
    reason = triton_unavailable_reason(q.device, q.dtype, q.shape[3], v.shape[3], decays)
    if reason is None:
        return TRITON
    if backend == "auto":
        return EAGER
    raise RuntimeError(f"`backend='triton'` cannot run here: {reason}. Use backend='auto' or 'eager'.")


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, coefficients: tuple[float, ...]) -> None:
    # Messages are written only where they are raised: they take longer than a small kernel runs, and torch.compile
    # with dynamic=True can trace none about a number.
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"`{name}` must be [batch, tokens, heads, dim], but its shape is {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"`{name}` must be floating point, but its dtype is {x.dtype}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"`q`, `k` and `v` must have one dtype, but they have {q.dtype}, {k.dtype} and {v.dtype}.")
    (batch, length, heads, width), (*k_size, kv_heads, k_width), (*v_size, v_heads, dim) = q.shape, k.shape, v.shape
    if not [batch, length] == k_size == v_size:
        raise ValueError(
            "`q`, `k` and `v` must agree in batch and tokens, but they are "
            f"{tuple(q.shape[:2])}, {tuple(k.shape[:2])} and {tuple(v.shape[:2])}."
        )
    if length < 1:
        raise ValueError("`q` must have at least one token, but it has 0.")
    if width != k_width:
        raise ValueError(f"`q` and `k` must agree in size, but they have {width} and {k_width}.")
    if kv_heads != v_heads:
        raise ValueError(f"`k` and `v` must have the same number of heads, but they have {kv_heads} and {v_heads}.")
    if heads % kv_heads:
        raise ValueError(f"The heads of `q` must be a multiple of those of `k`, but they are {heads} and {kv_heads}.")
    if not 1 <= width <= MAX_FEATURE_DIM:
        raise ValueError(f"The last dimension of `q` and `k` must be 1 to {MAX_FEATURE_DIM}, but it is {width}.")
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"The last dimension of `v` must be 1 to {MAX_HEAD_DIM}, but it is {dim}.")
    if len(coefficients) != 3 or not any(coefficients):
        raise ValueError(f"`coefficients` must be (c0, c1, c2), not all zero, but got {coefficients}.")


def _check_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"`attention_mask` must be [batch, tokens] = ({batch}, {length}), but its shape is "
            f"{tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def _is_readable(x: torch.Tensor) -> bool:
    """Return whether the values may be read here: they are in host memory, and the call is not traced or faked."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not tracing and type(x) is torch.Tensor and x.device.type == "cpu"


def _check_segments(segment_ids: torch.Tensor, batch: int, length: int) -> None:
    if segment_ids.shape != (batch, length) or segment_ids.dtype != torch.int64:
        raise ValueError(
            f"`segment_ids` must be int64 [batch, tokens] = ({batch}, {length}), but it is {segment_ids.dtype} "
            f"{tuple(segment_ids.shape)}."
        )
    if _is_readable(segment_ids) and (segment_ids.diff(dim=1) < 0).any():
        raise ValueError("`segment_ids` must never decrease along a row, but they do.")


def _check_state(state: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    if state.shape != shape:
        raise ValueError(
            f"`{name}` must be [batch or sequences, kv heads, features, head_dim + 1] = {shape}, but its shape is "
            f"{tuple(state.shape)}."
        )


def _check_indices(state_indices: torch.Tensor, batch: int, slots: int) -> None:
    if state_indices.shape != (batch,) or state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`state_indices` must be int32 or int64 [batch] = ({batch},), but it is {tuple(state_indices.shape)} of "
            f"{state_indices.dtype}."
        )
    if state_indices.device.type == "cpu" and not torch.compiler.is_compiling():
        used = [slot for slot in state_indices.tolist() if slot >= 0]
        if any(slot >= slots for slot in used) or len(set(used)) < len(used):
            raise ValueError(
                f"`state_indices` must be different slots below {slots}, or negative, but they are "
                f"{state_indices.tolist()}."
            )


def _check_decay(
    log_decay: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    coefficients: tuple[float, ...],
    attention_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the decay in the dtype of the sums, 0 at padding."""
    if log_decay is None:
        return None
    if coefficients[0] or coefficients[1]:
        raise ValueError(
            "`log_decay` needs a kernel of squares alone, such as ReBased's (0, 0, 1), but `coefficients` are "
            f"{coefficients}."
        )
    if log_decay.shape != shape or not log_decay.is_floating_point():
        raise ValueError(
            f"`log_decay` must be floating point [batch, tokens, kv heads] = {shape}, but it is {log_decay.dtype} "
            f"{tuple(log_decay.shape)}."
        )
    if _is_readable(log_decay) and is_plain(log_decay) and not ((log_decay <= 0) & log_decay.isfinite()).all():
        raise ValueError("`log_decay` must be finite and at most 0 everywhere, but it is not.")
    log_decay = log_decay.to(dtype)
    return log_decay if attention_mask is None else log_decay.where(attention_mask[..., None], 0.0)


def rebased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0),
    scale: float | None = None,
    eps: float = 1e-12,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    normalized: bool = False,
    log_decay: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Compute causal linear attention with a kernel of degree two (Aksenov et al., 2024, section 4).

    With `s_ij = (q_i . k_j) * scale` and `w_ij = c0 + c1 s_ij + c2 s_ij**2`: `o_i = sum_{j<=i} w_ij v_j / (sum_{j<=i}
    w_ij + eps)`, in time linear in T. Sums and the division are in float32, or in float64 for float64 inputs. The
    result is differentiable in q, k, v, initial_state and log_decay.

    With `log_decay` older tokens count less: `w_ij` is multiplied by `exp(G_i - G_j)`, where `G_i` is the sum of
    `log_decay` up to token i. In other words the state is multiplied by `exp(log_decay)` before a token is added to
    it. Retention and gated linear attention do the same.

    Args:
        q (`torch.Tensor`): Queries [B, T, H_q, F]; T >= 1, 1 <= F <= 128, H_q a multiple of H_kv.
        k (`torch.Tensor`): Keys [B, T, H_kv, F].
        v (`torch.Tensor`): Values [B, T, H_kv, D], 1 <= D <= 256.
        coefficients (`tuple[float, float, float]`, *optional*, defaults to `(0, 0, 1)`):
            (c0, c1, c2): (0, 0, 1) is ReBased, (1, 1, 0.5) is Based.
        scale (`float`, *optional*, defaults to `F**-0.5`): Factor of the dot product.
        eps (`float`, *optional*, defaults to 1e-12): Added to the normaliser.
        attention_mask (`torch.Tensor`, *optional*): [B, T], zero or False where a key is padding. No query sees
            such a token, and it leaves no trace in the state.
        cu_seqlens (`torch.Tensor`, *optional*): int32 or int64 [N + 1], from 0 to T and never decreasing: the bounds
            of N sequences packed one after another. B is then 1, and states have N rows instead of B.
        segment_ids (`torch.Tensor`, *optional*): int64 [B, T], never decreasing along T: packed sequences by number
            instead of by bounds, for traced code that cannot tell how many there are. Eager backend only, no states.
        initial_state (`torch.Tensor`, *optional*): [B, H_kv, n_features, D + 1], the state that an earlier call
            returned.
        output_final_state (`bool`, *optional*, defaults to `False`): Return the state after the last token.
        normalized (`bool`, *optional*, defaults to `False`): Promise that queries and keys are normalised, so that
            `(q . k)**2` is far within the range of float32. The Triton backend then leaves out its passes over queries
            and keys that bring large ones into range. The eager backend needs no promise.
        log_decay (`torch.Tensor`, *optional*): [B, T, H_kv], finite and at most 0: the logarithm of the factor by
            which each token multiplies the state before it. Padding has no part in it. It is taken in the dtype of the
            sums, and needs `coefficients` with c0 = c1 = 0. The default is no decay.
        backend (`str`, *optional*, defaults to `"auto"`): "eager" is PyTorch, on any device. "triton" is the kernels
            for GPUs. "auto" is "triton" on a GPU where the kernels can run, and "eager" elsewhere.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: the output [B, T, H_q, D] in q's dtype, and the state or `None`.
        The state `sum_j phi(k_j) [v_j, 1]^T` is [B or N, H_kv, n_features, D + 1], float32 or, for float64 inputs,
        float64. Its last column is the normaliser's. Its rows are laid out as `feature_map` says, the same for both
        backends.

    Raises:
        `ValueError`: shapes, dtypes or options that do not fit; the message names the argument.
        `RuntimeError`: `backend="triton"` where it cannot run.

    Example:

    ```python
    >>> import torch
    >>> from modeling_rebased import rebased_attention

    >>> q, k, v = torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 64)
    >>> o, _ = rebased_attention(q, k, v)
    >>> o.shape
    torch.Size([2, 100, 4, 64])

    >>> first, state = rebased_attention(q[:, :60], k[:, :60], v[:, :60], output_final_state=True)
    >>> rest, state = rebased_attention(q[:, 60:], k[:, 60:], v[:, 60:], initial_state=state, output_final_state=True)
    >>> torch.allclose(torch.cat([first, rest], dim=1), o, atol=1e-5)
    True

    ```
    """
    coefficients = tuple(float(c) for c in coefficients)  # type: ignore[assignment]
    _check_tensors(q, k, v, coefficients)
    if not eps > 0:
        raise ValueError(f"`eps` must be positive, but got {eps}.")
    batch, length, _, feature_dim = q.shape
    scale = feature_dim**-0.5 if scale is None else float(scale)
    attention_mask = _check_mask(attention_mask, batch, length)
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"`cu_seqlens` packs sequences into a batch of 1, but the batch of `q` is {batch}.")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "`cu_seqlens` must be a vector of at least two int32 or int64, but it is "
                f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}."
            )
        # Reading the values of a GPU tensor would make the host wait for it in every layer.
        if _is_readable(cu_seqlens):
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
                raise ValueError(
                    f"`cu_seqlens` must rise from 0 to the number of tokens, {length}, but it is {bounds}."
                )
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        features = n_features(feature_dim, coefficients)
        _check_state(initial_state, "initial_state", (sequences, k.shape[2], features, v.shape[3] + 1))

    log_decay = _check_decay(log_decay, k.shape[:3], computation_dtype(q), coefficients, attention_mask)

    packing = {"cu_seqlens": cu_seqlens}
    if segment_ids is not None:
        if cu_seqlens is not None or initial_state is not None or output_final_state:
            raise ValueError("`segment_ids` goes with none of `cu_seqlens`, `initial_state` and `output_final_state`.")
        if backend == "triton":
            raise ValueError("`segment_ids` needs the eager backend: give `backend='triton'` `cu_seqlens`.")
        _check_segments(segment_ids, batch, length)
        packing, backend = {"segment_ids": segment_ids}, "eager"
    chosen = choose_backend(backend, q, v, log_decay is not None)
    if chosen is TRITON:
        packing["normalized"] = normalized
    return chosen.attention(
        q,
        k,
        v,
        coefficients=coefficients,
        scale=scale,
        eps=eps,
        attention_mask=attention_mask,
        initial_state=initial_state,
        output_final_state=output_final_state,
        log_decay=log_decay,
        **packing,
    )


def rebased_attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0),
    scale: float | None = None,
    eps: float = 1e-12,
    attention_mask: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    log_decay: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute one token of generation: `rebased_attention` with T = 1, without gradients. Changes the state in place.

    A server keeps the states of all its requests in one tensor of slots. With `state_indices` the operator reads and
    writes the states of a batch where they lie, without gathering them. It decides nothing by the values of tensors,
    so it can be captured in a CUDA graph.

    Args:
        q (`torch.Tensor`): [B, 1, H_q, F].
        k (`torch.Tensor`): [B, 1, H_kv, F].
        v (`torch.Tensor`): [B, 1, H_kv, D].
        state (`torch.Tensor`): float32 [B, H_kv, n_features, D + 1], changed in place; with `state_indices`,
            [slots, H_kv, n_features, D + 1]. Any strides. The eager backend takes float64 too.
        coefficients, scale, eps, backend: as in `rebased_attention`.
        attention_mask (`torch.Tensor`, *optional*): [B, 1]; a row that is False keeps its state.
        state_indices (`torch.Tensor`, *optional*): int32 or int64 [B], the slot of `state` that belongs to each row.
            Slots of different rows must differ, else the result is undefined. A row whose slot is negative is padding:
            it touches no state, and its output is 0.
        log_decay (`torch.Tensor`, *optional*): [B, 1, H_kv], as in `rebased_attention`.

    Returns:
        `torch.Tensor`: [B, 1, H_q, D] in q's dtype.

    Raises:
        `ValueError`: shapes, dtypes or options that do not fit; the message names the argument. Slots are compared
            with the size of `state` on a CPU only, because the host would have to wait for a GPU to read them.
    """
    coefficients = tuple(float(c) for c in coefficients)  # type: ignore[assignment]
    _check_tensors(q, k, v, coefficients)
    if q.shape[1] != 1:
        raise ValueError(f"`q` must hold one token, but it holds {q.shape[1]}.")
    features = n_features(q.shape[3], coefficients)
    rows = q.shape[0] if state_indices is None else state.shape[0]
    _check_state(state, "state", (rows, k.shape[2], features, v.shape[3] + 1))
    if state_indices is not None:
        _check_indices(state_indices, q.shape[0], rows)
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`state` must be float32 or float64, but its dtype is {state.dtype}.")
    if not eps > 0:
        raise ValueError(f"`eps` must be positive, but got {eps}.")
    attention_mask = _check_mask(attention_mask, q.shape[0], 1)
    log_decay = _check_decay(log_decay, k.shape[:3], state.dtype, coefficients, attention_mask)
    return choose_backend(backend, q, v).decode(
        q,
        k,
        v,
        state,
        coefficients=coefficients,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        eps=eps,
        attention_mask=attention_mask,
        state_indices=state_indices,
        log_decay=log_decay,
    )

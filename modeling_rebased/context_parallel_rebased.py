# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""Split one sequence over several processes: context parallelism.

Each rank of a process group holds a *shard*, consecutive tokens of the sequence. What an earlier shard leaves for a
later one is of constant size. A ReBased layer leaves its state, a sum over tokens, so the state before a shard is the
sum of the states of the shards before it. A convolution leaves its last `conv_kernel_size - 1` inputs. The ranks
exchange these once per layer and direction, by an all-gather. Each rank adds up what it needs, always in one order.

An exchange is in two parts, `start_exchange` and `finish_exchange`. What stands between them in the program runs while
the tensors are on the way. In the backward pass it is the same, with the parts in the other order.

Symbols: W ranks, B batch, T tokens of this rank's shard, K conv_kernel_size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.utils import is_tracing

from .attention_rebased import EAGER, TRITON, _check_mask, _check_tensors, choose_backend
from .batch_rebased import Packing, find_packing
from .configuration_rebased import PURELY_RECURRENT
from .eager_rebased import computation_dtype, feature_map, segment_ids_of, without_autocast
from .triton_context_rebased import factors_of_rows
from .triton_inputs_rebased import needs_range
from .triton_rebased import OPS, bring_into_range


class Exchange(NamedTuple):
    """What each rank takes from all ranks' tensors [B, m, ...], as weights of their rows, 0 or 1.

    `takes` is float32 [B or 1, m, W * m] for this rank: its row i is the sum of `takes[:, i, p * m + j]` times row j
    of rank p. `gives` is the same map from the other side, for gradients: how this rank's rows enter each rank's.
    """

    group: str
    takes: torch.Tensor
    gives: torch.Tensor


class ContextShard(NamedTuple):
    """Where a rank's tokens stand in the whole sequence, worked out once per forward pass.

    `states` says whose state each rank takes, and `inputs` which inputs of its convolutions, `None` if K is 1. `tail`
    is int64 [B, K - 1], the columns of the shard's last tokens that are not padding, -1 where there are too few.
    `first` and `last`, bool [B, T], say which tokens belong to the packed sequence of the first and of the last token,
    `None` if all do. `offset` is int64 [B, 1], the tokens of the first token's sequence in earlier shards.
    """

    states: Exchange
    inputs: Exchange | None
    tail: torch.Tensor
    first: torch.Tensor | None
    last: torch.Tensor | None
    offset: torch.Tensor

    def count_on(self, position_ids: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Return positions [B or 1, T] that were counted in the shard alone, on from the earlier shards."""
        offset = self.offset if self.first is None else self.offset * self.first
        if padding_mask is None:
            return position_ids + offset
        # Padding repeats the position before it, also across the bound.
        leading = (padding_mask != 0).long().cumsum(1) == 0
        return (position_ids + offset - leading.long()).clamp_min(0)


# ---------------------------------------------------------------- the exchange


def _send(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """Start to gather the tensors [B, ...] of all W = `size` ranks, [W, B, ...]. torch.compile can trace this."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], size, group)


def _received(pending: torch.Tensor) -> torch.Tensor:
    """Wait until what `_send` returned is complete."""
    return torch.ops._c10d_functional.wait_tensor(pending)


def _all_gather(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """Return the tensors [B, ...] of all W = `size` ranks, [W, B, ...]."""
    return _received(_send(x, group, size))


def _combine(gathered: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return sums [B, m, ...] of all ranks' rows [W, B, m, ...] by `weights` [B or 1, m, W * m]."""
    rows = gathered.transpose(0, 1).flatten(1, 2).flatten(2)  # [B, W * m, numbers]
    # Not a matrix product, which may run in TF32.
    sums = (weights.to(rows.dtype)[..., None] * rows[:, None]).sum(2).to(rows.dtype)
    return sums.view(gathered.shape[1:])


class _Start(torch.autograd.Function):
    """Send rows, and in the backward pass receive their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gives: torch.Tensor, group: str, size: int) -> torch.Tensor:
        ctx.save_for_backward(gives)
        return _send(x, group, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pending: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gives,) = ctx.saved_tensors
        return _combine(_received(pending), gives), None, None, None


class _Finish(torch.autograd.Function):
    """Receive rows, and in the backward pass send the gradients of their sums."""

    @staticmethod
    def forward(ctx: Any, pending: torch.Tensor, takes: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group, ctx.size = group, pending.shape[0]
        return _combine(_received(pending), takes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _send(gradient, ctx.group, ctx.size), None, None


def start_exchange(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Send this rank's rows x [B, m, ...] to all ranks, and return what only `finish_exchange` may read."""
    return _Start.apply(x, exchange.gives, exchange.group, exchange.takes.shape[2] // exchange.takes.shape[1])


def finish_exchange(pending: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Wait for the rows of all ranks, and return those that this rank takes, [B, m, ...]."""
    return _Finish.apply(pending, exchange.takes, exchange.group)


def send_inputs(shard: ContextShard, x: torch.Tensor) -> torch.Tensor | None:
    """Start the exchange of a convolution's last inputs, of x [B, T, size]; `None` if there is none."""
    if shard.inputs is None:
        return None
    missing = (shard.tail < 0)[..., None]
    tail = x.gather(1, shard.tail.clamp_min(0)[..., None].expand(-1, -1, x.shape[2])).masked_fill(missing, 0.0)
    return start_exchange(tail, shard.inputs)


def put_inputs_before(
    shard: ContextShard,
    pending: torch.Tensor,
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Put the K - 1 inputs before this shard in front of a convolution's inputs, 0 where there are none.

    They are tokens of the first token's sequence. What the convolution makes of them is not used.

    Args:
        shard (`ContextShard`): the place of the shard.
        pending (`torch.Tensor`): from `send_inputs`.
        x, gate (`torch.Tensor`): [B, T, size].
        attention_mask, segment_ids (`torch.Tensor`): [B, T].

    Returns:
        `tuple`: the same four for K - 1 + T tokens.
    """
    assert shard.inputs is not None  # or nothing would be pending
    room = shard.tail.shape[1]
    x = torch.cat([finish_exchange(pending, shard.inputs), x], dim=1)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (room, 0), value=1)
    if segment_ids is not None:
        segment_ids = torch.cat([segment_ids[:, :1].expand(-1, room), segment_ids], dim=1)
    if gate is not None:
        gate = F.pad(gate, (0, 0, room, 0))
    return x, attention_mask, segment_ids, gate


# ---------------------------------------------------------------- the operator


class _TritonShard(torch.autograd.Function):
    """Compute attention over a shard by the Triton kernels.

    The forward pass runs over the shard with the state that comes before it. The backward pass sums the gradient of
    that state over the shard's queries, and exchanges it for the gradient of the state after the shard. The gradient
    of the queries, which does not need that, is computed meanwhile.

    q, k, `ranges` and `row_factors` come from `bring_into_range`, or the latter two are `None`. Each rank has units of
    its own then, and states are exchanged without units. `pending` is what `_send` returned for the shard's state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pending: torch.Tensor,
        mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        first: torch.Tensor | None,
        ranges: torch.Tensor | None,
        row_factors: torch.Tensor | None,
        takes: torch.Tensor,
        gives: torch.Tensor,
        group: str,
        c0: float,
        c1: float,
        c2: float,
        scale: float,
        eps: float,
    ) -> torch.Tensor:
        initial = _combine(_received(pending), takes)[:, 0]
        if row_factors is not None:
            initial = initial * row_factors
        if cu_seqlens is not None:  # what came before is of the first of N sequences
            initial = F.pad(initial, (0, 0, 0, 0, 0, 0, 0, cu_seqlens.shape[0] - 2))
        o, _, inverse_z, states, norms = OPS.forward(
            q, k, v, mask, cu_seqlens, initial, c0, c1, c2, scale, eps, False, ranges
        )
        ctx.save_for_backward(
            q, k, v, mask, cu_seqlens, first, ranges, row_factors, gives, o, inverse_z, states, norms
        )
        ctx.group, ctx.size, ctx.coefficients = group, pending.shape[0], (c0, c1, c2, scale)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, mask, cu_seqlens, first, ranges, row_factors, gives, o, inverse_z, states, norms = ctx.saved_tensors
        # A query of another sequence than the first token's has no part in the state before the shard.
        reaching = inverse_z if first is None else inverse_z * first[:, None]
        of_initial = OPS.state_gradient(gradient, q, o, reaching, k.shape[2], *ctx.coefficients, ranges)
        if row_factors is not None:
            of_initial = of_initial * row_factors
        pending = _send(of_initial[:, None], ctx.group, ctx.size)
        dq, *scaled = OPS.shard_dq(
            gradient, q, k, v, o, inverse_z, states, norms, mask, cu_seqlens, *ctx.coefficients, ranges
        )
        of_final = _combine(_received(pending), gives)[:, 0]
        if row_factors is not None:
            of_final = of_final / row_factors
        if cu_seqlens is not None:  # what comes after is of the last of N sequences
            of_final = F.pad(of_final, (0, 0, 0, 0, 0, 0, cu_seqlens.shape[0] - 2, 0))
        dk, dv = OPS.shard_dkdv(of_final, q, k, v, *scaled, mask, cu_seqlens, *ctx.coefficients, ranges)
        return dq, dk, dv, *[None] * 14


def _sum_state(
    k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None, coefficients: tuple[float, float, float]
) -> torch.Tensor:
    """Return sum_j phi(k_j) [v_j, 1]^T, [B, H_kv, n_features, D + 1], in PyTorch."""
    dtype = computation_dtype(k)
    with without_autocast(k.device):
        values = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], dim=-1).transpose(1, 2)
        if kept is not None:
            values = values * kept[:, None, :, None].to(dtype)
        return feature_map(k.to(dtype), coefficients).permute(0, 2, 3, 1) @ values


def _kept(shard: ContextShard, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return which keys are part of the state that the shard gives to the next, [B, T], `None` for all."""
    return mask if shard.last is None else shard.last if mask is None else mask & shard.last


def _send_by_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    shard: ContextShard,
    mask: torch.Tensor | None,
    coefficients: tuple[float, float, float],
    scale: float,
    row_factors: torch.Tensor | None = None,
) -> torch.Tensor:
    with torch.no_grad():  # `_TritonShard` has its gradient
        state = OPS.state(k, v, _kept(shard, mask), *coefficients, scale)
        if row_factors is not None:
            state = state / row_factors
        return _send(state[:, None], shard.states.group, shard.states.takes.shape[2])


def send_state(
    k: torch.Tensor,
    v: torch.Tensor,
    shard: ContextShard,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    attention_mask: torch.Tensor | None = None,
    normalized: bool = False,
    backend: str = "auto",
) -> torch.Tensor | None:
    """Start the exchange of the shard's state, which needs no queries, and return what `attend_shard` takes.

    It is `None` where large queries and keys must first be brought into range, which needs both. The arguments are
    those of `attend_shard`.
    """
    coefficients = tuple(float(c) for c in coefficients)  # type: ignore[assignment]
    mask = _check_mask(attention_mask, k.shape[0], k.shape[1])
    if choose_backend(backend, k, v) is TRITON:
        if needs_range(k, coefficients, normalized):
            return None
        return _send_by_triton(k, v, shard, mask, coefficients, scale)
    return start_exchange(_sum_state(k, v, _kept(shard, mask), coefficients)[:, None], shard.states)


def attend_shard(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shard: ContextShard,
    pending: torch.Tensor | None,
    *,
    coefficients: tuple[float, float, float],
    scale: float,
    eps: float,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    normalized: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute `rebased_attention_shard` for a shard whose place is known and whose state is on its way.

    `pending` comes from `send_state`, with the same arguments.
    `cu_seqlens` and `segment_ids` tell of the packed sequences within the shard, both or neither.
    """
    coefficients = tuple(float(c) for c in coefficients)  # type: ignore[assignment]
    _check_tensors(q, k, v, coefficients)
    mask = _check_mask(attention_mask, q.shape[0], q.shape[1])
    exchange = shard.states
    if choose_backend(backend, q, v) is TRITON:
        ranges = row_factors = None
        if pending is None:
            q, k, _, ranges, factors = bring_into_range(q, k, coefficients, mask, None)
            row_factors = factors_of_rows(factors, q.shape[3], v.shape[3], *coefficients, scale)
            pending = _send_by_triton(k, v, shard, mask, coefficients, scale, row_factors)
        options = (*exchange[1:], exchange.group, *coefficients, scale, float(eps))
        return _TritonShard.apply(q, k, v, pending, mask, cu_seqlens, shard.first, ranges, row_factors, *options)
    assert pending is not None  # this backend brings nothing into range
    # What comes in belongs to the first token's sequence, which is what this backend takes an initial state to be.
    output, _ = EAGER.attention(
        q,
        k,
        v,
        coefficients=coefficients,
        scale=scale,
        eps=eps,
        attention_mask=mask,
        segment_ids=segment_ids,
        initial_state=finish_exchange(pending, exchange)[:, 0],
    )
    return output


def rebased_attention_shard(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: Any,
    coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0),
    scale: float | None = None,
    eps: float = 1e-12,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalized: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Compute `rebased_attention` over a sequence that is split over the ranks of a process group.

    Every rank calls it with its own tokens. The shards follow one another in the order of the ranks, and may differ in
    length. The result and the gradients are those of one call with all tokens. Every rank must also take part in the
    backward pass.

    Args:
        q, k, v, coefficients, scale, eps, normalized, backend: as in `rebased_attention`, for this rank's tokens.
        group (`ProcessGroup` or one-dimensional `DeviceMesh`): The ranks.
        attention_mask (`torch.Tensor`, *optional*): [B, T], zero or False where this rank's key is padding.
        cu_seqlens (`torch.Tensor`, *optional*): int32 or int64 [N + 1], the bounds of packed sequences among the
            tokens of all ranks, the same on every rank. B is then 1.

    Returns:
        `torch.Tensor`: the output [B, T, H_q, D] for this rank's tokens, in q's dtype.

    Raises:
        `ValueError`: shapes, dtypes or bounds that do not fit; the message names the argument.
        `RuntimeError`: `backend="triton"` where it cannot run.

    Example:

    ```python
    >>> import torch.distributed as dist
    >>> from modeling_rebased import rebased_attention_shard

    >>> dist.init_process_group("nccl")  # under torchrun
    >>> o = rebased_attention_shard(q, k, v, group=dist.group.WORLD)  # this rank's tokens
    ```
    """
    name = group_name(group)
    me, size = _rank_and_size(name)
    _check_tensors(q, k, v, coefficients)
    batch, length = q.shape[:2]
    mask = _check_mask(attention_mask, batch, length)
    seq_idx = packing = None
    if cu_seqlens is not None:
        lengths = _all_gather(torch.tensor([length], device=q.device), name, size)[:, 0].tolist()
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != sum(lengths) or bounds != sorted(bounds):
            raise ValueError(
                f"`cu_seqlens` must rise from 0 to the number of tokens of all ranks, {sum(lengths)}, but it is "
                f"{bounds}."
            )
        start = sum(lengths[:me])
        seq_idx = segment_ids_of(cu_seqlens, sum(lengths))[:, start : start + length].expand(batch, -1)
        packing = find_packing(q, None, None, None, seq_idx)
    shard = locate_shard(name, q, 1, mask, packing, None, seq_idx)
    options: dict[str, Any] = {
        "coefficients": coefficients,
        "scale": q.shape[3] ** -0.5 if scale is None else float(scale),
        "attention_mask": mask,
        "normalized": normalized,
        "backend": backend,
    }
    return attend_shard(
        q,
        k,
        v,
        shard,
        send_state(k, v, shard, **options),
        eps=eps,
        cu_seqlens=packing.cu_seqlens if packing is not None else None,
        segment_ids=packing.segment_ids if packing is not None else None,
        **options,
    )


# ---------------------------------------------------------------- the place of a shard


def group_name(group: Any) -> str:
    """Return the name of a process group, or of that of a device mesh of one dimension.

    Raises:
        `TypeError`: `group` is neither.
        `ValueError`: the mesh has several dimensions.
    """
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"`group` must be a mesh of one dimension, such as mesh['cp'], but it has {group.ndim}: "
                f"{group.mesh_dim_names}."
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"`group` must be a ProcessGroup or a DeviceMesh, but it is a {type(group).__name__}.")
    return group.group_name


def _rank_and_size(group: str) -> tuple[int, int]:
    from torch.distributed.distributed_c10d import _resolve_process_group  # not in builds without torch.distributed

    ranks = _resolve_process_group(group)
    return dist.get_rank(ranks), dist.get_world_size(ranks)


class _Summary(NamedTuple):
    """What the other ranks must know of one row of a shard."""

    length: int
    real: int  # tokens that are not padding
    real_of_last: int  # those of them in the last token's sequence
    bounds: int  # between packed sequences
    first: int  # the first token's `seq_idx`, or the first real token's position
    last: int
    tail: tuple[int, ...]  # the packed sequence of each column in `tail`, counted from the shard's first; -1 for none


def locate_shard(
    group: str,
    tokens: torch.Tensor,
    kernel_size: int,
    padding_mask: torch.Tensor | None,
    packing: Packing | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> ContextShard:
    """Let the ranks tell one another about their shards, and work out what each takes from the others.

    This is one small all-gather per forward pass, for which the host waits.

    Args:
        group (`str`): Name of the process group.
        tokens (`torch.Tensor`): [B, T, ...] of this rank; only its shape and its device matter.
        kernel_size (`int`): K.
        padding_mask (`torch.Tensor`, *optional*): [B, T], 0 at padding.
        packing (`Packing`, *optional*): the packed sequences in this shard.
        position_ids, seq_idx (`torch.Tensor`, *optional*): [B or 1, T], what tells whether the first token goes on
            with the sequence of the token before it, on the rank before. By default it does.

    Raises:
        `ValueError`: packed sequences in a batch of more than 1, or a call that torch.compile traces.
    """
    if is_tracing(tokens):
        raise ValueError(
            "torch.compile cannot trace a whole model that is split over ranks. Compile its layers: "
            "`for layer in model.model.layers: layer.compile()`."
        )
    me, size = _rank_and_size(group)
    batch, length = tokens.shape[:2]
    device = tokens.device
    columns = torch.arange(length, device=device).expand(batch, -1)
    real = torch.ones_like(columns, dtype=torch.bool) if padding_mask is None else padding_mask != 0
    segments = torch.zeros_like(columns) if packing is None else packing.segment_ids.expand(batch, -1)
    segments = segments - segments[:, :1]
    first, last = segments == 0, segments == segments[:, -1:]
    room = kernel_size - 1
    tail = F.pad(torch.where(real, columns, -1), (room, 0), value=-1).topk(room, dim=1).values.flip(1)
    if seq_idx is not None:
        ends = seq_idx[:, 0].expand(batch), seq_idx[:, -1].expand(batch)
    elif position_ids is not None:
        marked = torch.where(real, columns, -1)
        edges = torch.where(real, columns, length - 1).amin(1), marked.amax(1).clamp_min(0)
        ends = tuple(position_ids.expand(batch, -1).gather(1, edge[:, None])[:, 0] for edge in edges)
    else:
        ends = torch.zeros_like(columns[:, 0]), torch.zeros_like(columns[:, 0])
    numbers = [torch.full_like(ends[0], length), real.sum(1), (real & last).sum(1), segments[:, -1], *ends]
    of_tail = segments.gather(1, tail.clamp_min(0)).masked_fill(tail < 0, -1)
    table = _all_gather(
        torch.cat([torch.stack(numbers, dim=1).long(), of_tail], dim=1), group, size
    )  # [W, B, 6 + room]
    ranks = table.tolist()
    by_row = [[_Summary._make([*rank[row][:6], tuple(rank[row][6:])]) for rank in ranks] for row in range(batch)]

    key = "seq_idx" if seq_idx is not None else "position_ids" if position_ids is not None else None
    sequences = [_number_sequences(row, key) for row in by_row]
    if batch > 1 and any(last > 0 for row in sequences for _, last in row):
        raise ValueError(
            f"`{key}` restart within a row, which packs sequences: that takes a batch of 1, but the batch is {batch}."
        )
    reached = sequences[0]  # in a batch of several rows, each row is one sequence
    takes, gives = torch.zeros(1, 1, size), torch.zeros(1, 1, size)
    for other in range(size):
        takes[0, 0, other] = other < me and reached[other][1] == reached[me][0]
        gives[0, 0, other] = other > me and reached[me][1] == reached[other][0]
    offset = [sum(rank.real_of_last * int(takes[0, 0, i]) for i, rank in enumerate(row)) for row in by_row]
    packed = packing is not None
    return ContextShard(
        states=Exchange(group, takes.to(device), gives.to(device)),
        inputs=_exchange_of_inputs(group, by_row, sequences, me, room, device) if room else None,
        tail=tail,
        first=first if packed else None,
        last=last if packed else None,
        offset=torch.tensor(offset, device=device)[:, None],
    )


def _number_sequences(ranks: list[_Summary], key: str | None) -> list[tuple[int, int]]:
    """Return the numbers of the packed sequences of each rank's first and last token, in one row.

    `key` is the argument that tells whether a shard begins a new sequence, as `find_packing` reads it within a shard.
    """
    padded = any(rank.real < rank.length for rank in ranks)
    numbers: list[tuple[int, int]] = []
    number, before = 0, None
    for rank in ranks:
        if before is None or key is None or (key == "position_ids" and rank.real == 0):
            joined = True
        elif key == "seq_idx":
            joined = rank.first == before.last
        else:
            joined = rank.first > before.last if padded else rank.first == before.last + 1
        number += 0 if joined else 1
        numbers.append((number, number + rank.bounds))
        number += rank.bounds
        if key == "seq_idx" or rank.real > 0:
            before = rank
    return numbers


def _exchange_of_inputs(
    group: str,
    by_row: list[list[_Summary]],
    sequences: list[list[tuple[int, int]]],
    me: int,
    room: int,
    device: torch.device,
) -> Exchange:
    """Return whose last inputs each rank's convolutions take: the nearest `room` tokens of its first sequence."""
    size = len(by_row[0])
    takes = torch.zeros(len(by_row), room, size * room)
    gives = torch.zeros_like(takes)

    def sources(row: int, rank: int) -> list[tuple[int, int]]:
        """Return (rank, row of its tail) of the tokens before a shard, the nearest first."""
        wanted = sequences[row][rank][0]
        found: list[tuple[int, int]] = []
        for other in range(rank - 1, -1, -1):
            first, last = sequences[row][other]
            if last < wanted or len(found) >= room:
                break
            tail = by_row[row][other].tail
            found += [(other, i) for i in range(room - 1, -1, -1) if tail[i] >= 0 and first + tail[i] == wanted]
        return found[:room]

    for row in range(len(by_row)):
        for distance, (other, i) in enumerate(sources(row, me)):
            takes[row, room - 1 - distance, other * room + i] = 1
        for other in range(me + 1, size):
            for distance, (rank, i) in enumerate(sources(row, other)):
                if rank == me:
                    gives[row, i, other * room + room - 1 - distance] = 1
    return Exchange(group, takes.to(device), gives.to(device))


# ---------------------------------------------------------------- models and batches


def check_layers(layer_types: list[str]) -> None:
    """Refuse models with layers whose past has no constant size.

    Raises:
        `ValueError`: names their types.
    """
    others = sorted(set(layer_types) - PURELY_RECURRENT)
    if others:
        raise ValueError(
            f"Context parallelism takes layers of the types {sorted(PURELY_RECURRENT)}, but this model also has "
            f"{others}. Softmax attention needs the keys and values of all earlier tokens, which are not exchanged."
        )


# What a batch may hold: tensors [B, T] or [B, T, hidden_size] that are split, and what describes packed sequences of
# the whole row, which `seq_idx` replaces.
SPLIT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "token_type_ids")
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def shard_sequence(batch: Mapping[str, Any], group: Any) -> dict[str, Any]:
    """Return this rank's part of a batch: consecutive tokens of every row, as many on each rank but for one.

    Every rank of the group gives the same batch. The labels are shifted before they are split, so the last token of a
    shard learns the first token of the next. With `num_items_in_batch` the model's loss on each rank is scaled so that
    its mean over the ranks, and the mean of the gradients, are those of the whole batch.

    Args:
        batch (`Mapping[str, Any]`): What the model's forward takes: `input_ids` or `inputs_embeds`, and any of
            `attention_mask`, `position_ids`, `labels`, `shift_labels`, `token_type_ids`, `num_items_in_batch`, and
            `cu_seq_lens_q` or `seq_idx` for packed sequences.
        group (`ProcessGroup` or one-dimensional `DeviceMesh`): The ranks.

    Returns:
        `dict[str, Any]`: The same for this rank's tokens. Packed sequences are marked by `seq_idx`.

    Raises:
        `ValueError`: A key that cannot be split, a tensor of another length, or fewer tokens than ranks.
    """
    rank, size = _rank_and_size(group_name(group))
    tokens = batch.get("input_ids") if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    if tokens is None:
        raise ValueError("`batch` must have `input_ids` or `inputs_embeds`, but it has neither.")
    rows, length = tokens.shape[:2]
    if length < size:
        raise ValueError(f"`batch` has {length} tokens per row, which is too few for {size} ranks.")
    unknown = sorted(
        key for key, value in batch.items() if value is not None and key not in (*SPLIT, *BOUNDS, "num_items_in_batch")
    )
    if unknown:
        raise ValueError(f"`batch` has keys that cannot be split over ranks: {unknown}.")
    given = {key: batch[key] for key in SPLIT if batch.get(key) is not None}
    for key, value in given.items():
        # `==`, since torch.compile takes a dynamic size for one that is not `in` a tuple of equal sizes
        fits = value.shape[:2] == (rows, length) or value.shape[:2] == (1, length)
        if not fits or (key != "inputs_embeds" and value.ndim != 2):
            raise ValueError(
                f"`{key}` must be [batch, tokens] = ({rows}, {length}), but its shape is {tuple(value.shape)}."
            )
    mask = given.get("attention_mask")
    mask = mask if mask is not None and (mask == 0).any() else None
    packing = find_packing(tokens, given.get("position_ids"), mask, batch.get("cu_seq_lens_q"), batch.get("seq_idx"))
    if packing is not None:
        given["seq_idx"] = packing.segment_ids
    if "labels" in given and "shift_labels" not in given:
        given["shift_labels"] = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    start, stop = rank * length // size, (rank + 1) * length // size
    shard = {key: value[:, start:stop].contiguous() for key, value in given.items()}
    if "labels" in given:
        items = batch.get("num_items_in_batch")
        items = (given["shift_labels"] != -100).sum() if items is None else items
        shard["num_items_in_batch"] = items / size
    return shard

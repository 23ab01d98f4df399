# Copyright 2026 The ReBased for Hugging Face authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""How the tokens of a call are cut into segments and runs, and where the states of the segments are stored.

The states of a sequence lie in *slots*, one after another: the initial state if there is one, then the state of each
segment, but for the last segment's unless the state after it is wanted. Packed sequences share one row of slots.
triton_plan_rebased.py says what segments and runs are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .triton_language_rebased import INTERPRETED
from .triton_launch_rebased import PreparedCall, grid_of_rows
from .triton_layout_rebased import Layout
from .triton_plan_rebased import segments_per_run


class Segments(NamedTuple):
    """How the tokens are cut."""

    sequences: int
    slots: int  # slots per sequence, or of all together if packed
    total: int  # slots of all sequences
    computed: int  # segments per sequence whose own state is needed, or of all together if packed
    length: int  # tokens per segment
    run: int  # segments per run
    tables: dict[str, Tensor | None]  # what the kernels read of packed sequences, by their names for it

    @property
    def packed(self) -> bool:
        """Whether sequences are packed and told apart by cu_seqlens."""
        return self.tables["cu_seqlens"] is not None


def count_slots(batch: int, length: int, segment: int, initial: bool, last: bool, sequences: int | None) -> int:
    """Return the slots of all sequences, by a formula without branches on T, as fake implementations need it.

    Args:
        batch, length: B and T.
        segment: tokens per segment.
        initial, last: whether there is a state before the first token, and whether the one after the last is wanted.
        sequences: the number of packed sequences, or None. Packed ones may leave some slots unused.
    """
    if sequences is None:
        return batch * ((length - 1) // segment + int(initial) + int(last))
    return length // segment + sequences * (int(initial) + int(last))


def cut_into_segments(
    prepared: PreparedCall,
    x: Tensor,
    kv_heads: int,
    initial: bool,
    last: bool,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> Segments:
    """Return the segments of x [B, T, ...]; `initial` and `last` as in `count_slots`.

    `reverse` is for the states of later queries, whose first segment is the sequence's last.
    """
    batch, length = x.shape[:2]
    segment = prepared.segment
    if cu_seqlens is None:
        cut = prepared.cuts.get(reverse)
        if cut is None:
            slots = (length - 1) // segment + initial + last
            computed = (length - 1) // segment + last
            run = segments_per_run(prepared.plan, batch * computed, kv_heads, reverse, x.device)
            tables = dict.fromkeys(("cu_seqlens", "segment_sequence", "first_segment", "first_slot"))
            cut = prepared.cuts[reverse] = Segments(batch, slots, batch * slots, computed, segment, run, tables)
        return cut
    sequences = cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.to(torch.int32).contiguous()
    count = (bounds.diff() + segment - 1) // segment
    zero = torch.zeros(1, dtype=torch.int32, device=bounds.device)
    first_segment = torch.cat([zero, count.cumsum(0, dtype=torch.int32)])
    slots = (count - 1 + int(last)).clamp(min=0) + int(initial)
    first_slot = torch.cat([zero, slots.cumsum(0, dtype=torch.int32)])
    most = length // segment + sequences
    numbers = torch.arange(most, dtype=torch.int32, device=bounds.device)
    sequence_of = torch.searchsorted(first_segment[1:].contiguous(), numbers, right=True, out_int32=True)
    sequence_of = sequence_of.clamp(max=sequences - 1)
    tables = {
        "cu_seqlens": bounds,
        "segment_sequence": sequence_of,
        "first_segment": first_segment,
        "first_slot": first_slot,
    }
    total = count_slots(batch, length, segment, initial, last, sequences)
    run = segments_per_run(prepared.plan, most, kv_heads, reverse, x.device)
    return Segments(sequences, total, total, most, segment, run, tables)


def grid_of_blocks(x: Tensor, heads: int, rows: int, cut: Segments) -> tuple[int, int, int]:
    """Return the grid of `heads` programs for each block of `rows` tokens of x [B, T, ...]."""
    if cut.packed:
        return grid_of_rows(cut.computed * (cut.length // rows) * heads, 1)
    return grid_of_rows(-(-x.shape[1] // rows) * heads, x.shape[0])


def allocate_states(like: Tensor, slots: int, kv_heads: int, layout: Layout, exact: bool) -> tuple[Tensor, Tensor]:
    """Return flat storage for states [slots, H_kv, rows, DP] and norms [slots, H_kv, rows].

    States are stored in the compute type, or in fp32 if the totals are results of their own (`exact`). Spare elements
    keep the sizes away from 0 and 1, on which torch.export would specialise the sequence length.
    """
    exact = exact or like.dtype != torch.bfloat16 or INTERPRETED
    rows = slots * kv_heads * layout.rows
    # opcheck, which runs on the interpreter, compares every element, spare ones too.
    empty = like.new_zeros if INTERPRETED else like.new_empty
    states = empty(rows * layout.d + 16, dtype=torch.float32 if exact else torch.bfloat16)
    return states, empty(rows + 16, dtype=torch.float32)

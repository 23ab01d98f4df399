"""What the kernels of a profiled time took."""

from types import SimpleNamespace

import pytest
import torch

from modeling_rebased.eval.profiling import kernel_times


def event(start, end, name, device=torch.autograd.DeviceType.CUDA):
    return SimpleNamespace(
        time_range=SimpleNamespace(start=start, end=end), name=name, device_type=device, is_user_annotation=False
    )


def test_times_that_overlap_count_once():
    events = [
        event(0, 2000, "gemm"),
        event(1000, 4000, "ncclDevKernel_AllReduce_Sum_f32"),  # of which 1 ms runs beside gemm, and 1 ms beside norm
        event(3000, 5000, "norm"),
        event(7000, 8000, "gemm"),
        event(0, 9000, "aten::mm", torch.autograd.DeviceType.CPU),
    ]
    row = kernel_times(SimpleNamespace(events=lambda: events), steps=2)
    assert row.pop("longest") == "gemm 1.50; ncclDevKernel_AllReduce_Sum_f32 1.50; norm 1.00"
    assert row.pop("gap_before") == "gemm"
    assert row == pytest.approx(
        {
            "kernels": 2,
            "busy_ms": 3.0,  # 0 to 5 and 7 to 8, in two steps
            "gap_ms": 2.0,
            "compute_ms": 2.5,  # 0 to 2, 3 to 5 and 7 to 8
            "all_gather_ms": 0.0,
            "all_reduce_ms": 1.5,
            "copy_ms": 0.0,
        }
    )

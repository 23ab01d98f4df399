# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compile the kernels for kinds of GPU that are not here, and look for faults of ptxas in their machine code.

    python tests/modeling_rebased/kernel_targets.py FOLDER CAPABILITY,F ...

prints the shared memory of every kernel for each compute capability, and writes kernels in which ptxas 12.8 made
faults to the folder. Launches are recorded only, so it needs Triton, but no GPU. `record_for`, `launches_of` and
`compile_kernel` do the same for other programs (eval/results/kernels).
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_rebased import (
    triton_backward_rebased,
    triton_forward_rebased,
    triton_launch_rebased,
    triton_plan_rebased,
    triton_rebased,
)


TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TYPES |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
REBASED = (0.0, 0.0, 1.0, 0.25, 1e-12, False, None)  # coefficients, scale, eps, sums in fp32, units
BASED = (1.0, 1.0, 0.5, 0.25, 1e-12, False)

Launch = tuple[Any, dict[str, Any]]  # a kernel and its arguments with the options of the compiler
launches: list[Launch] = []


def record_for(capability: int) -> None:
    """Record launches from now on instead of making them, as for a GPU of this compute capability."""

    def record(kernel: Any, grid: Any, **arguments: Any) -> Any:
        assert not set(kernel.arg_names) - set(arguments), set(kernel.arg_names) - set(arguments)
        launches.append((kernel, arguments))
        return collections.defaultdict(object)  # launchers by grid, none of which is called

    triton.JITFunction.__getitem__ = lambda kernel, grid: lambda **arguments: record(kernel, grid, **arguments)
    plans: Any = triton_plan_rebased
    plans._is_hopper = lambda device: capability == 90
    plans._is_blackwell = lambda device: capability == 100
    triton_launch_rebased._PREPARED.clear()  # plans for another kind of GPU
    launches.clear()


def launches_of(
    length: int,
    feature_dim: int,
    head_dim: int,
    kv_heads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    decay: torch.Tensor | None = None,
) -> list[Launch]:
    """Return what ReBased's attention launches, forward and backward, for two query heads and one sequence."""
    triton_launch_rebased._PREPARED.clear()
    launches.clear()
    q, k, v = (
        torch.zeros(1, length, heads, n, dtype=dtype, requires_grad=True)
        for heads, n in ((2, feature_dim), (kv_heads, feature_dim), (kv_heads, head_dim))
    )
    triton_rebased._Attention.apply(q, k, v, None, None, None, *REBASED, decay)[0].sum().backward()
    return list(launches)


def compile_kernel(launch: Launch, capability: int) -> Any:
    """Compile what was to be launched, and return what Triton makes of it."""
    kernel, arguments = launch[0], dict(launch[1])
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value, parameter = arguments.pop(name), kernel.params[i]
        free = parameter.do_not_specialize  # compiled for any value, also for 1 and multiples of 16
        signature[name] = "constexpr"
        if parameter.is_constexpr:
            pass
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and (value != 1 or free):
            signature[name] = "i32"
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and not free):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    # what no parameter has taken are options of the compiler
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=arguments)


def write_machine_code(found: list[Launch], kernel: str, path: Path) -> Path:
    """Compile the first launch of a kernel for compute capability 9.0, write its machine code, and return the path."""
    launch = next(launch for launch in found if launch[0].__name__ == kernel)
    path.write_bytes(compile_kernel(launch, 90).asm["cubin"])
    return path


def disassembler() -> Path:
    """Return where Triton's package has it, if it does."""
    return Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


def disassemble(cubin: Path) -> str:
    """Return a kernel's machine code as text, with one instruction or label per line."""
    return subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout


def sums_of_one_register(cubin: Path) -> list[str]:
    """Return additions of 64-bit numbers whose halves come from one register, which ptxas 12.8 did, and wrongly."""
    found: list[str] = []
    low: dict[str, str] = {}  # the register of the lower half by the predicate that takes the carry
    for line in re.findall(r"\*/ +([^;]*?) *;", disassemble(cubin)):
        operation, *registers = re.split(r"[ ,]+", line.replace(".reuse", ""))
        if operation in ("UIADD3.X", "IADD3.X"):
            found += [line for carry in registers[3:] if low.get(carry) == registers[1] not in ("RZ", "URZ")]
        low = {carry: register for carry, register in low.items() if register not in registers[:1]}
        if operation in ("UIADD3", "IADD3") and registers[1].startswith(("P", "UP")) and registers[2] != registers[0]:
            low[registers[1]] = registers[2]
    return found


def written_registers(operation: str, operands: list[str]) -> range:
    """Return the numbers of the registers that an instruction writes."""
    if operation.startswith(("ST", "BAR", "RED", "R2UR", "BRA")):
        return range(0)
    while operands and re.fullmatch(r"U?P\w+", operands[0]):  # predicates that it writes too
        operands = operands[1:]
    if not operands or not re.fullmatch(r"R\d+", operands[0]):
        return range(0)
    first, count = int(operands[0][1:]), 1
    if operation.startswith("HGMMA"):
        count = int(re.findall(r"\.\d+x(\d+)x", operation)[0]) // 2
    elif ".128" in operation or operation.endswith(".4"):
        count = 4
    elif ".64" in operation or operation.endswith(".2") or operation.startswith(("IMAD.WIDE", "CS2R")):
        count = 2
    return range(first, first + count)


def overwritten_operands(cubin: Path) -> list[str]:
    """Return matrix products one of whose left operand's registers may still hold another product's operand.

    ptxas 12.8 computed an operand before a loop that needed it in each step, and let a later product of the loop write
    one of its registers. Such a register was last written by one of several instructions, and these write it for
    different products. (The same instruction in two branches writes it for one product.)
    """
    code: list[tuple[Any, ...]] = []
    labels: dict[str, int] = {}
    for line in disassemble(cubin).replace(".reuse", "").splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*\w{4,}\*/\s+(@!?U?P\w+)?\s*(\S+)\s*(.*?)\s*;", line):
            code.append(instruction.groups())
    writes = [written_registers(operation, rest.split(", ")) for _, operation, rest in code]
    before: list[list[int]] = [[] for _ in range(len(code) + 1)]
    for i, (predicate, operation, rest) in enumerate(code):
        if operation == "BRA":
            before[labels[re.findall(r"\.L_x_\d+", rest)[0]]].append(i)
        if predicate or operation not in ("BRA", "EXIT"):
            before[i + 1].append(i)
    writers: dict[tuple[int, int], set[int]] = {}
    readers: dict[tuple[int, int], set[int]] = {}
    for i, (_, operation, rest) in enumerate(code):
        if not operation.startswith("HGMMA") or not re.match(r"R\d+, R\d", rest):
            continue
        first = int(re.findall(r"R(\d+)", rest)[1])
        for register in range(first, first + 4):
            seen: set[int] = set()
            found: set[int] = set()
            ahead = [i]
            while ahead:
                for j in before[ahead.pop()]:
                    if j in seen:
                        continue
                    seen.add(j)
                    if register in writes[j]:
                        found.add(j)
                    if register not in writes[j] or code[j][0]:
                        ahead.append(j)
            writers[i, register] = found
            for j in found:
                readers.setdefault((j, register), set()).add(i)
    return [
        f"{code[i][2]}: R{register} of {[code[j] for j in sorted(found)]}"
        for (i, register), found in writers.items()
        if len({code[j] for j in found}) > 1 and len({frozenset(readers[j, register]) for j in found}) > 1
    ]


def launches_of_all_kernels(capability: int, feature_dim: int, head_dim: int, length: int) -> list[Launch]:
    """Return launches of all kernels that are worth compiling for a kind of GPU, some of them several times."""
    if capability == 90:  # Based, every weight of which has units of its own
        q, k = (torch.zeros(1, length, 2, feature_dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        v = torch.zeros(1, length, 2, head_dim, dtype=torch.bfloat16, requires_grad=True)
        ranges = torch.ones(1, 2, length)
        triton_rebased._Attention.apply(q, k, v, None, None, None, *BASED, ranges, None)[0].sum().backward()
        mask = torch.ones(1, length, dtype=torch.bool)
        within, others, *_ = triton_rebased.bring_into_range(q, k, (0.0, 0.0, 1.0), mask, None)
        (within.sum() + others.sum()).backward()
        return list(launches)
    if capability != 80:
        return launches_of(length, feature_dim, head_dim, kv_heads=2)
    # A kernel with a decay has all that one without it has, and more.
    launches_of(length, feature_dim, head_dim, kv_heads=2, decay=torch.zeros(1, length, 2, requires_grad=True))
    # Those below have no matrix products, for which kinds of GPU differ.
    q, k, v = (torch.zeros(3, 1, 2, n, dtype=torch.bfloat16) for n in (feature_dim, feature_dim, head_dim))
    state = torch.zeros(5, 2, feature_dim * (feature_dim + 1) // 2, head_dim + 1)
    options: dict[str, Any] = {"coefficients": (0.0, 0.0, 1.0), "scale": 0.25, "eps": 1e-12}
    for indices in (None, torch.zeros(3, dtype=torch.int32)):
        rows = state if indices is not None else state[:3]
        of_token = torch.zeros(3, 1, 2)
        triton_rebased.triton_rebased_decode(q, k, v, rows, state_indices=indices, log_decay=of_token, **options)
    q, k, v = (x[:1, :, :1] for x in (q, k, v))  # one program, of several warps
    triton_rebased.triton_rebased_decode(q, k, v, state[:1, :1], **options)
    x, gate = (torch.zeros(1, 300, 96, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight, bias = torch.zeros(96, 3, dtype=torch.bfloat16), torch.zeros(96, dtype=torch.bfloat16)
    triton_rebased.triton_short_conv(x, weight, bias, gate, torch.zeros(1, 300, dtype=torch.int64)).sum().backward()
    return list(launches)


def keys_in_cache(kernels: list[Any]) -> dict[str, str]:
    """Return the keys by which Triton finds kernels in its cache, if it meets them in this order."""
    for module in list(sys.modules.values()):
        for function in list(vars(module).values()) if module.__name__.startswith("modeling_rebased.triton") else ():
            if isinstance(function, triton.JITFunction):
                function.hash, function.used_global_vals = None, {}
    triton_launch_rebased._start_once.__wrapped__()
    return {kernel.__name__: kernel.cache_key for kernel in kernels}


def main(folder: Path, targets: list[str]) -> None:
    """Compile for all targets."""
    kernels = [triton_forward_rebased._forward_kernel, triton_backward_rebased._dq_kernel]
    assert keys_in_cache(kernels) == keys_in_cache(kernels[::-1])
    for target in targets:
        capability, width = map(int, target.split(","))
        record_for(capability)
        for launch in launches_of_all_kernels(capability, width, 64, 2300):
            print("compiled", capability, launch[0].__name__, compile_kernel(launch, capability).metadata.shared)
        if capability == 90:
            # rows of less than 16 numbers, and no states
            write_machine_code(launches_of(256, 12, 32, kv_heads=2), "_dq_kernel", folder / "narrow.cubin")
            for f, d in ((24, 48), (64, 128), (16, 256)):  # two query heads per key-value head, and a decay
                found = launches_of(200, f, d, decay=torch.zeros(1, 200, 1))
                write_machine_code(found, "_dkdv_kernel", folder / f"decay-{f}-{d}.cubin")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

# Copyright 2026 The ReBased for Hugging Face authors
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Other machines than this one: kinds of GPU that are not here, and none with Triton missing."""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from modeling_rebased import triton_rebased
from modeling_rebased.triton_language_rebased import triton


# Calls all passes with launches that are recorded only, then compiles what was to be launched.
SCRIPT = """
import collections
import os
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_rebased import triton_backward_rebased, triton_forward_rebased
from modeling_rebased import triton_launch_rebased, triton_plan_rebased, triton_rebased

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
launches = []


def record(kernel, grid, **arguments):
    assert not set(kernel.arg_names) - set(arguments), set(kernel.arg_names) - set(arguments)
    launches.append((kernel, arguments))
    return collections.defaultdict(object)  # launchers by grid, none of which is called


triton.JITFunction.__getitem__ = lambda kernel, grid: lambda **arguments: record(kernel, grid, **arguments)
triton_plan_rebased._is_hopper = lambda device: capability == 90
triton_plan_rebased._is_blackwell = lambda device: capability == 100


def launch(feature_dim, head_dim, length):
    q, k = (torch.zeros(1, length, 2, feature_dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.zeros(1, length, 2, head_dim, dtype=torch.bfloat16, requires_grad=True)
    # A kernel with a decay has all that one without it has, and more.
    decay = torch.zeros(1, length, 2, requires_grad=True) if capability == 80 else None
    if capability != 90:
        rebased = (0.0, 0.0, 1.0, 0.25, 1e-12, False, None, decay)
        triton_rebased._Attention.apply(q, k, v, None, None, None, *rebased)[0].sum().backward()
    else:  # every weight has units of its own
        ranges = torch.ones(1, 2, length)
        based = (1.0, 1.0, 0.5, 0.25, 1e-12, False, ranges, None)
        triton_rebased._Attention.apply(q, k, v, None, None, None, *based)[0].sum().backward()
        mask = torch.ones(1, length, dtype=torch.bool)
        within, others, *_ = triton_rebased.bring_into_range(q, k, (0.0, 0.0, 1.0), mask, None)
        (within.sum() + others.sum()).backward()
    if capability != 80:  # those below have no matrix products, for which kinds of GPU differ
        return
    token = [x[:, :1].detach().expand(3, -1, -1, -1).contiguous() for x in (q, k, v)]
    state = torch.zeros(5, 2, feature_dim * (feature_dim + 1) // 2, head_dim + 1)
    options = {"coefficients": (0.0, 0.0, 1.0), "scale": 0.25, "eps": 1e-12}
    of_token = decay[:, :1].detach().expand(3, -1, -1)
    for indices in (None, torch.zeros(3, dtype=torch.int32)):
        rows = state if indices is not None else state[:3]
        triton_rebased.triton_rebased_decode(*token, rows, state_indices=indices, log_decay=of_token, **options)
    alone = [x[:1, :, :1] for x in token]  # one program, of several warps
    triton_rebased.triton_rebased_decode(*alone, state[:1, :1], **options)
    x, gate = (torch.zeros(1, 300, 96, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight, bias = torch.zeros(96, 3, dtype=torch.bfloat16), torch.zeros(96, dtype=torch.bfloat16)
    triton_rebased.triton_short_conv(x, weight, bias, gate, torch.zeros(1, 300, dtype=torch.int64)).sum().backward()


def compile(kernel, arguments):
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


def keys_in_cache(kernels):  # by which Triton finds kernels in its cache, if it meets them in this order
    for module in list(sys.modules.values()):
        for function in list(vars(module).values()) if module.__name__.startswith("modeling_rebased.triton") else ():
            if isinstance(function, triton.JITFunction):
                function.hash, function.used_global_vals = None, {}
    triton_launch_rebased._start_once.__wrapped__()
    return {kernel.__name__: kernel.cache_key for kernel in kernels}


kernels = [triton_forward_rebased._forward_kernel, triton_backward_rebased._dq_kernel]
assert keys_in_cache(kernels) == keys_in_cache(kernels[::-1])
for target in sys.argv[1:]:
    capability, width = map(int, target.split(","))
    triton_launch_rebased._PREPARED.clear()  # plans for another kind of GPU
    launches.clear()
    launch(width, 64, 2300)
    for kernel, arguments in launches:
        print("compiled", capability, kernel.__name__, compile(kernel, arguments).metadata.shared)
    if capability == 90:  # rows of less than 16 numbers, and no states
        launches.clear()
        q, k, v = (torch.zeros(1, 256, 2, n, dtype=torch.bfloat16, requires_grad=True) for n in (12, 12, 32))
        rebased = (0.0, 0.0, 1.0, 0.25, 1e-12, False, None, None)
        triton_rebased._Attention.apply(q, k, v, None, None, None, *rebased)[0].sum().backward()
        kernel, arguments = next(found for found in launches if found[0].__name__ == "_dq_kernel")
        Path(os.environ["TRITON_CACHE_DIR"], "narrow.cubin").write_bytes(compile(kernel, arguments).asm["cubin"])
        for f, d in ((24, 48), (64, 128), (16, 256)):  # two query heads per key-value head, and a decay
            launches.clear()
            q, k, v = (torch.zeros(1, 200, h, n, dtype=torch.bfloat16, requires_grad=True)
                       for h, n in ((2, f), (1, f), (1, d)))
            rebased = (0.0, 0.0, 1.0, 0.25, 1e-12, False, None, torch.zeros(1, 200, 1))
            triton_rebased._Attention.apply(q, k, v, None, None, None, *rebased)[0].sum().backward()
            kernel, arguments = next(found for found in launches if found[0].__name__ == "_dkdv_kernel")
            cubin = Path(os.environ["TRITON_CACHE_DIR"], f"decay-{f}-{d}.cubin")
            cubin.write_bytes(compile(kernel, arguments).asm["cubin"])
"""


TARGETS = [(80, 99, 16), (90, 227, 16), (100, 227, 32)]


def compile_for_targets(cache: Path) -> list[list[str]]:
    """Return what the script compiles for one kind of GPU after another: (kind, kernel, bytes of shared memory)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(path for path in sys.path if path)
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    command = [sys.executable, "-c", SCRIPT, *(f"{capability},{width}" for capability, _, width in TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("compiled")]


def disassembler() -> Path:
    """Return where Triton's package has it, if it does."""
    return Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


def disassemble(cubin: Path) -> str:
    """Return a kernel's machine code as text, with one instruction or label per line."""
    return subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout


def sums_of_one_register(cubin: Path) -> list[str]:
    """Return additions of 64-bit numbers whose halves come from one register, which ptxas 12.8 did, and wrongly."""
    found, low = [], {}  # the register of the lower half by the predicate that takes the carry
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
    code, labels = [], {}
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
    writers, readers = {}, {}
    for i, (_, operation, rest) in enumerate(code):
        if not operation.startswith("HGMMA") or not re.match(r"R\d+, R\d", rest):
            continue
        first = int(re.findall(r"R(\d+)", rest)[1])
        for register in range(first, first + 4):
            seen, ahead, found = set(), [i], set()
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


@pytest.mark.skipif(not triton_rebased.HAS_TRITON, reason="needs the package triton")
def test_kernels_compile(tmp_path):
    """D = 64 in bfloat16, with states: within the shared memory of a block, in KiB (8.6 has less than 8.0).

    Based for 9.0, and ReBased for the other two.
    """
    compiled = compile_for_targets(tmp_path)
    for capability, shared, width in TARGETS:
        found = [(name, int(size)) for kind, name, size in compiled if int(kind) == capability]
        names = {"_state_kernel", "_scan_kernel", "_forward_kernel", "_dq_kernel", "_dkdv_kernel"}
        names |= {"_decode_kernel", "_conv_kernel", "_conv_backward_kernel"} if capability == 80 else set()
        names |= {"_scale_kernel", "_gradient_kernel"} if width > 16 else set()
        names |= {"_low_state_kernel", "_largest_kernel", "_multiply_kernel"} if capability == 90 else set()
        assert {name for name, _ in found} == names, capability
        assert max(size for _, size in found) <= shared * 1024, capability
    if disassembler().exists():
        assert not sums_of_one_register(tmp_path / "narrow.cubin")
        found = {path.stem: overwritten_operands(path) for path in tmp_path.glob("decay-*.cubin")}
        assert len(found) == 3 and not any(found.values()), found


def test_without_triton(monkeypatch):
    """The files are read as they are, and say why their backend cannot run."""
    monkeypatch.setitem(sys.modules, "triton", None)
    package = types.ModuleType("without_triton")
    package.__path__ = [str(Path(triton_rebased.__file__).parent)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    module = importlib.import_module("without_triton.triton_rebased")
    assert not module.HAS_TRITON
    assert "not installed" in module.triton_unavailable_reason(torch.device("cpu"), torch.float32, 16, 64)
    for name in [name for name in sys.modules if name.startswith("without_triton.")]:
        del sys.modules[name]

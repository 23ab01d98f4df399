"""Compare sequences that are split over processes with one process, on all ranks of several process groups.

    python context_parallel_ranks.py FOLDER cpu|cuda PROCESSES [CASE ...]

Each rank writes what failed to FOLDER/RANK.json, by the names of the case and of the group's size. On a CPU,
`train_lm` then writes FOLDER/trained-1 and FOLDER/trained-2, by one process and by two that share each sequence.
"""

import itertools
import json
import os
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.parallelism_config import ParallelismConfig
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_rebased import (
    ReBasedConfig,
    ReBasedForCausalLM,
    ReBasedForSequenceClassification,
    rebased_attention_shard,
    shard_sequence,
)
from modeling_rebased.configuration_rebased import PURELY_RECURRENT
from modeling_rebased.eager_rebased import naive_rebased_attention
from modeling_rebased.training import train_lm
from tests.interpreter import prepare_interpreter
from tests.modeling_rebased.cases import make_ids, make_model


DEVICE = "cpu"
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}  # the kernels multiply float32 by three products of TF32
LENGTH = 23  # which 2, 3 and 4 do not divide
LINEAR = {"layer_types": ["conv", "linear_attention"] * 2, "num_hidden_layers": 4}
# The kinds of model by what meets a bound between shards: the paper's, then every other option of these two layers.
MODELS = {
    "paper": LINEAR,
    "compiled": {"layer_types": ["conv", "linear_attention"], "num_hidden_layers": 2},
    "learned positions": {**LINEAR, "position_embedding_type": "learned", "conv_kernel_size": 5},
    "ten positions": {**LINEAR, "position_embedding_type": "learned", "max_position_embeddings": 10},
    "based": {
        **LINEAR,
        "kernel": "based",
        "conv_type": "gated",
        "position_embedding_type": "rope",
        "rope_linear_attention": True,
        "qk_norm_scope": "head",
        "qk_norm_shared": True,
    },
}


def dtype_of_models() -> torch.dtype:
    return torch.float64 if DEVICE == "cpu" else torch.float32


def close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compare by the largest difference, relative to the largest number."""
    error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    bar = 1e-6 if got.dtype == expected.dtype == torch.float64 else TOLERANCE[DEVICE]
    assert error <= bar, f"{what}: relative error {error:.2e}"


def bounds_of(rank: int, size: int, length: int) -> slice:
    return slice(rank * length // size, (rank + 1) * length // size)


# ---------------------------------------------------------------- the operator


def check_operator(rank: int, size: int, group, backend: str, length: int, packed: bool, padded: bool, heads: int = 4):
    torch.manual_seed(3)
    batch, coefficients = 1 if packed else 2, (1.0, 1.0, 0.5) if padded else (0.0, 0.0, 1.0)
    q = torch.randn(batch, length, heads, 5)
    k, v = torch.randn(batch, length, 2, 5), torch.randn(batch, length, 2, 3)
    k[:, length // 2 :] *= 8  # the kernels bring large keys into range, by another factor on each rank
    gradient = torch.randn(batch, length, heads, 3)
    q, k, v, gradient = (x.to(DEVICE) for x in (q, k, v, gradient))
    bounds = [0, 1, length // 2 + 1, length - 1, length] if packed else [0, length]
    mask = torch.rand(batch, length, device=DEVICE) > 0.3 if padded else None
    # The oracle is the definition in float64, by each packed sequence alone.
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    expected = [
        naive_rebased_attention(
            *(x[:, start:stop] for x in inputs),
            coefficients=coefficients,
            attention_mask=mask[:, start:stop] if padded else None,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    expected = torch.cat(expected, dim=1)
    expected_gradients = torch.autograd.grad(expected, inputs, gradient.double())
    mine = bounds_of(rank, size, length)
    inputs = [x[:, mine].clone().requires_grad_() for x in (q, k, v)]
    output = rebased_attention_shard(
        *inputs,
        group=group,
        coefficients=coefficients,
        attention_mask=mask[:, mine] if padded else None,
        cu_seqlens=torch.tensor(bounds, device=DEVICE) if packed else None,
        backend=backend,
    )
    gradients = torch.autograd.grad(output, inputs, gradient[:, mine])
    close(output, expected[:, mine], "output")
    for name, got, wanted in zip("qkv", gradients, expected_gradients):
        assert (got - wanted[:, mine]).abs().max() <= TOLERANCE[DEVICE] * wanted.abs().max(), f"gradient of {name}"


def operator_plain(rank, size, group):
    check_operator(rank, size, group, "eager", 600, False, False)  # several chunks on one rank


def operator_packed(rank, size, group):
    check_operator(rank, size, group, "eager", LENGTH, True, False)


def operator_padded(rank, size, group):
    check_operator(rank, size, group, "eager", LENGTH, False, True)


def operator_packed_and_padded(rank, size, group):
    check_operator(rank, size, group, "eager", LENGTH, True, True)


def triton(rank, size, group):
    """The kernels, on a CPU by Triton's interpreter, which takes seconds."""
    if size == 2:
        check_operator(rank, size, group, "triton", 11, True, True, heads=2)


# ---------------------------------------------------------------- models


def batch_of(kind: str, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = make_ids(1 if "packed" in kind else 3, length)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if "padded" in kind:
        mask = torch.ones_like(ids)
        mask[0, :9] = 0  # the whole first shard of 3 or 4
        mask[-1, length // 2 + 1] = 0
        if len(ids) > 1:
            mask[1, 10:] = 0
        if kind == "padded on the right":
            mask = (torch.arange(length) < 10).long().expand_as(ids).clone()
        batch["attention_mask"] = mask
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    sizes = [3, 10, 2, 8]
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(size) for size in sizes])[None]
    elif kind == "packed at the bounds of shards":
        batch["position_ids"] = torch.arange(length)[None] % 11
    elif kind == "packed by bounds":
        batch["cu_seq_lens_q"] = F.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    elif kind == "packed and padded":
        batch["seq_idx"] = torch.arange(4).repeat_interleave(torch.tensor(sizes))[None]
    elif kind == "padded, positions without padding":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    elif kind == "padded, positions with padding":
        batch["position_ids"] = torch.arange(length)[None]
    elif kind == "positions":
        batch["position_ids"] = torch.arange(5, 5 + length)[None]
    return {name: value.to(DEVICE) for name, value in batch.items()}


def run_whole(model: ReBasedForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the loss, the logits and the gradients of one process."""
    model.set_context_parallel_group(None)
    output = model(**batch)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    return output.loss.detach(), output.logits.detach(), dict(zip(names, gradients))


def check_model(rank: int, size: int, group, name: str, batch: dict[str, torch.Tensor], prepare=None, shard=None):
    """Compare loss, logits and gradients of all parameters with one process.

    In float64 where there is a CPU, so that no error can hide in the rounding.
    """
    model = make_model("paper", **MODELS[name]).to(DEVICE, dtype_of_models())
    loss, logits, gradients = run_whole(model, batch)
    if prepare is not None:
        prepare(model)
    model.set_context_parallel_group(group)
    if shard is None:
        mine, shard = bounds_of(rank, size, batch["input_ids"].shape[1]), shard_sequence(batch, group)
    else:
        mine, shard = shard
    output = model(**shard)
    output.loss.backward()
    real = torch.ones_like(batch["input_ids"]) if "attention_mask" not in batch else batch["attention_mask"]
    real = real[:, mine, None].bool()
    if output.logits is not None:  # in training on a GPU, the loss is computed without them
        close(torch.where(real, output.logits, 0.0), torch.where(real, logits[:, mine], 0.0), "logits")
    # Padding gives no labels, so the mean of the losses over the ranks is the loss of the whole batch.
    mean = output.loss.detach().clone()
    dist.all_reduce(mean, group=group)
    close(mean / size, loss, "loss")
    every = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    dist.all_reduce(every, group=group)
    parts = every.split([parameter.numel() for parameter in model.parameters()])
    for (parameter_name, expected), gradient in zip(gradients.items(), parts):
        close(gradient.view_as(expected) / size, expected, parameter_name)


def _model_case(name: str, kind: str):
    """On 1, 2 and 4 processes, and the paper's model on 3 too."""

    def run(rank, size, group):
        if size != 3 or name == "paper":
            check_model(rank, size, group, name, batch_of(kind))

    return run


def shards_shorter_than_a_convolution(rank, size, group):
    """Five taps, and shards of one and two tokens: a shard takes inputs of several ranks."""
    check_model(rank, size, group, "learned positions", batch_of("plain", 7))


def shards_of_one_token(rank, size, group):
    if size > 2:
        check_model(rank, size, group, "paper", batch_of("plain", size))


def shards_cut_by_hand(rank, size, group):
    """Shards of any lengths, positions that restart between and within shards, and labels without a count."""
    batch = batch_of("packed at the bounds of shards")
    cuts = [0, 1, 11, 14, LENGTH][: size + 1]
    cuts[-1] = LENGTH
    mine = slice(cuts[rank], cuts[rank + 1])
    shift_labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    shard = {name: value[:, mine] for name, value in batch.items()}
    shard |= {"shift_labels": shift_labels[:, mine], "num_items_in_batch": (LENGTH - 1) / size}
    check_model(rank, size, group, "learned positions", batch, shard=(mine, shard))


def single_precision(rank, size, group):
    model = make_model("paper", **LINEAR).to(DEVICE)
    batch = batch_of("plain")
    logits = run_whole(model, batch)[1]
    model.set_context_parallel_group(group)
    close(model(**shard_sequence(batch, group)).logits, logits[:, bounds_of(rank, size, LENGTH)], "logits")


def gradient_checkpointing(rank, size, group):
    def prepare(model):
        model.gradient_checkpointing_enable()
        model.train()

    check_model(rank, size, group, "paper", batch_of("plain"), prepare)


def compiled_layers(rank, size, group):
    def prepare(model):
        for layer in model.model.layers:
            layer.compile(backend="eager" if DEVICE == "cpu" else "inductor", fullgraph=True)

    if size == 2:
        check_model(rank, size, group, "compiled", batch_of("packed"), prepare)


def half_precision(rank, size, group):
    """Under autocast to bfloat16 states stay in float32: a split run is as near to float32 as a whole one."""
    if size != 2:
        return
    model, batch = make_model("paper", **LINEAR).to(DEVICE), batch_of("plain")
    exact = run_whole(model, batch)[1]
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        whole = model(**batch).logits.float()
        model.set_context_parallel_group(group)
        split = model(**shard_sequence(batch, group)).logits.float()
    mine = bounds_of(rank, size, LENGTH)
    assert (split - exact[:, mine]).norm() <= 1.5 * (whole - exact)[:, mine].norm()


def two_runs_are_equal(rank, size, group):
    model = make_model("paper", **LINEAR).to(DEVICE)
    model.set_context_parallel_group(group)
    shard = shard_sequence(batch_of("plain"), group)
    first, second = (torch.autograd.grad(model(**shard).loss, list(model.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def with_fsdp2_and_data_parallelism(rank, size, group):
    """Two sequences, each over two ranks: the weights are sharded within a sequence and replicated between the two."""
    if size != 4:
        return
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "cp"))
    batches = [batch_of("plain"), batch_of("padded")]
    model = make_model("paper", **LINEAR).to(DEVICE)
    wholes = [run_whole(model, batch) for batch in batches]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.set_context_parallel_group(mesh["cp"])
    model(**shard_sequence(batches[mesh.get_local_rank("dp")], mesh["cp"])).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad.full_tensor(), sum(whole[2][name] for whole in wholes) / 2, name)


# ---------------------------------------------------------------- what is refused


def refused(message: str, function, *arguments, **options) -> None:
    try:
        function(*arguments, **options)
    except (ValueError, TypeError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing says {message!r}")


def what_cannot_be_split_is_refused(rank, size, group):
    for name in ("every_type", "hybrid", "softmax"):
        model = make_model(name)
        others = sorted(set(model.config.layer_types) - PURELY_RECURRENT)
        refused(str(others), model.set_context_parallel_group, group)
    refused("`decay='gate'`", make_model("paper", decay="gate").set_context_parallel_group, group)
    refused(
        "whole sequence",
        ReBasedForSequenceClassification(make_model("paper").config).set_context_parallel_group,
        group,
    )
    model = make_model("paper").to(DEVICE)
    refused("must be a ProcessGroup or a DeviceMesh", model.set_context_parallel_group, "cp")
    model.set_context_parallel_group(group)
    batch = batch_of("packed by bounds")
    refused("`seq_idx`", model, **batch)
    refused("cannot be used", model.generate, batch["input_ids"], max_new_tokens=2)
    refused("too few", shard_sequence, batch_of("plain", size - 1), group) if size > 1 else None
    refused("['pixel_values']", shard_sequence, {**batch, "pixel_values": batch["input_ids"]}, group)
    refused("`attention_mask` must be", shard_sequence, {**batch, "attention_mask": batch["input_ids"][:, 1:]}, group)
    refused("neither", shard_sequence, {"labels": batch["labels"]}, group)
    q = torch.ones(1, 3, 1, 2, device=DEVICE)
    bounds = torch.tensor([0, 2], device=DEVICE)
    refused("`cu_seqlens` must rise", rebased_attention_shard, q, q, q, group=group, cu_seqlens=bounds)
    if size > 1:
        rows = {"input_ids": make_ids(2, 6).to(DEVICE), "position_ids": torch.arange(6, device=DEVICE)[None]}
        refused("batch of 1", model, **rows)  # each rank begins at 0 again: other sequences, in two rows


CASES = {
    function.__name__.replace("_", " "): function
    for function in (
        operator_plain,
        operator_packed,
        operator_padded,
        operator_packed_and_padded,
        triton,
        shards_shorter_than_a_convolution,
        shards_of_one_token,
        shards_cut_by_hand,
        single_precision,
        gradient_checkpointing,
        compiled_layers,
        half_precision,
        two_runs_are_equal,
        with_fsdp2_and_data_parallelism,
        what_cannot_be_split_is_refused,
    )
}
CASES |= {
    f"{name}, {kind}": _model_case(name, kind)
    for name, kind in (
        ("paper", "plain"),
        ("paper", "padded"),
        ("paper", "packed"),
        ("paper", "packed by bounds"),
        ("paper", "packed and padded"),
        ("learned positions", "plain"),
        ("learned positions", "padded"),
        ("learned positions", "packed"),
        ("learned positions", "packed at the bounds of shards"),
        ("learned positions", "packed by bounds"),
        ("learned positions", "packed and padded"),
        ("learned positions", "positions"),
        ("learned positions", "padded, positions without padding"),
        ("learned positions", "padded, positions with padding"),
        ("ten positions", "padded on the right"),
        ("based", "plain"),
        ("based", "padded"),
        ("based", "packed"),
    )
}


def run_rank(rank: int, folder: str, device: str, processes: int, cases: list[str]) -> None:
    """Run the cases in groups of 1 to so many processes, and write down what failed.

    The largest group comes first, so that on GPUs all processes compile the kernels at the same time. A smaller group
    first would let the others wait for minutes.
    """
    global DEVICE
    DEVICE = device
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", processes)
    backend, timeout = ("gloo", timedelta(minutes=1)) if device == "cpu" else ("nccl", timedelta(minutes=10))
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)
    failures = {}
    for size in range(processes, 0, -1):
        group = dist.new_group(range(size))
        if rank >= size:
            continue
        for name in cases or CASES:
            try:
                CASES[name](rank, size, group)
            except Exception:
                failures[f"{name} ({size})"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------- training


def run_trainer(rank: int, folder: str, processes: int) -> None:
    """Train by `train_lm`, as a process that `accelerate launch` has started."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    if processes > 1:
        port = int(Path(folder, "port").read_text())
        sizes = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": processes}
        os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port, **sizes}.items()})
        # accelerate wants FSDP2 on GPUs beside `cp_size`. Here it is data parallelism on a CPU.
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    arguments = {
        "config": f"{folder}/config",
        "train_file": f"{folder}/text.txt",
        "eval_file": f"{folder}/text.txt",
        "context_length": 37,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": f"{folder}/trained-{processes}",
    }
    train_lm.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])


def compare_training(folder: str) -> None:
    """Run `run_trainer` in one process and in two."""
    text = "".join(f"the number {n} is followed by {n + 1}. " for n in range(12))  # 10 blocks: a batch of 4 leaves 2
    Path(folder, "text.txt").write_text(text)
    ReBasedConfig(
        vocab_size=258, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, feature_dim=4, intermediate_size=32
    ).save_pretrained(f"{folder}/config")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        Path(folder, "port").write_text(str(free.getsockname()[1]))
    for processes in (1, 2):
        multiprocessing.start_processes(run_trainer, (folder, processes), processes, start_method="fork")


if __name__ == "__main__":
    prepare_interpreter()
    folder, device, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Forked processes share what is imported. CUDA does not survive a fork.
    method = "fork" if device == "cpu" else "spawn"
    arguments = (folder, device, processes, sys.argv[4:])
    multiprocessing.start_processes(run_rank, arguments, processes, start_method=method)
    if device == "cpu":
        compare_training(folder)

"""Measure the weights that `rebased-mqar --save-weights` kept, epoch by epoch: what does an accuracy that falls mean?

    rebased-mqar --models rebased --hidden 128 --lengths 2048 --lrs 1e-2 --seeds 1 --save-weights weights
    python -m modeling_rebased.training.examine_mqar weights/NAME --output fall.jsonl

Each epoch is measured with Triton's kernels in bfloat16, as training measures, and with the PyTorch backend in
float32, without dropout and with it, on examples of the test and of the training data. The normaliser, the sum of a
query's weights, is compared with its median. By default these epochs are measured: the best, the last, one in the
middle between them, and the two between which the accuracy fell most.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from modeling_rebased.modeling_rebased import ReBasedLinearAttention

from . import mqar
from .arguments import HelpFormatter, with_dashes
from .folders import write_text
from .mqar import MQARExamples
from .mqar_runs import Run
from .values import count, known_device, list_of


def saved_epochs(folder: str | Path) -> dict[int, Path]:
    """Return the files of weights in a folder by their epoch, in rising order.

    Raises:
        FileNotFoundError: the folder has none.
    """
    files = {}
    for path in Path(folder).glob("epoch-*.pt"):
        if found := re.fullmatch(r"epoch-(\d+)", path.stem):
            files[int(found[1])] = path
    if not files:
        raise FileNotFoundError(f"{folder} has no weights epoch-N.pt, which rebased-mqar --save-weights writes")
    return dict(sorted(files.items()))


def choose_epochs(accuracies: dict[int, float]) -> list[int]:
    """Return the best epoch, the last, the middle one between them, and where the accuracy fell most, if it fell."""
    epochs = list(accuracies)
    best = max(range(len(epochs)), key=lambda i: accuracies[epochs[i]])
    chosen = {best, (best + len(epochs) - 1) // 2, len(epochs) - 1}
    if best < len(epochs) - 1:
        after = max(range(1, len(epochs)), key=lambda i: accuracies[epochs[i - 1]] - accuracies[epochs[i]])
        chosen |= {after - 1, after}
    return [epochs[i] for i in sorted(chosen)]


@torch.no_grad()
def measure(model: Any, examples: MQARExamples, *, bf16: bool, dropout: bool, batch_size: int) -> dict[str, float]:
    """Return the accuracy on the asked keys and the mean cross entropy there.

    Args:
        model: a model of MQAR.
        examples: on the model's device.
        bf16: compute as training does, under autocast.
        dropout: leave dropout on.
        batch_size: examples per forward pass.
    """
    model.train(dropout)
    correct, loss = 0, 0.0
    for first in range(0, len(examples), batch_size):
        part = examples[slice(first, first + batch_size)]
        places, values = part.positions.long(), part.values.long()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.base_model(input_ids=part.input_ids(), use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(
                hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            )
        correct += int((logits.argmax(-1) == values).sum())
        loss += float(F.cross_entropy(logits.flatten(0, 1).float(), values.flatten(), reduction="sum"))
    model.eval()
    return {"accuracy": correct / examples.values.numel(), "loss": loss / examples.values.numel()}


@torch.no_grad()
def normaliser(model: Any, examples: MQARExamples) -> dict[str, float]:
    """Return how small the normaliser of the attention is at the asked keys, in float64, without dropout.

    Returns:
        smallest_normaliser: the smallest sum of weights of a query in a head, relative to the head's median.
        small_normalisers: the share of queries and heads below a thousandth of that median.
        largest_product: the largest (q . k) / sqrt(F) in absolute value.
    """
    attention = model.base_model.layers[1].self_attn
    found: dict[str, torch.Tensor] = {}
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: found.update(hidden=kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    try:
        model.base_model(input_ids=examples.input_ids(), use_cache=False)
    finally:
        hook.remove()
    hidden, split = found["hidden"].float(), (-1, attention.feature_dim)
    q = attention.q_norm(attention.q_proj(hidden)).unflatten(-1, split).double()
    k = (attention.k_norm or attention.q_norm)(attention.k_proj(hidden)).unflatten(-1, split).double()
    places = examples.positions.long()
    q = q.gather(1, places[..., None, None].expand(-1, -1, *q.shape[2:]))  # [N, pairs, H, F]
    causal = torch.arange(hidden.shape[1], device=places.device) <= places[..., None]  # [N, pairs, T]
    c0, c1, c2 = attention.coefficients
    sums, largest = [], 0.0
    for head in range(q.shape[2]):
        s = q[:, :, head] @ k[:, :, head].transpose(1, 2) * attention.feature_dim**-0.5
        largest = max(largest, float(s.abs().max()))
        sums.append(((c0 + c1 * s + c2 * s * s) * causal).sum(-1).flatten())
    relative = torch.stack(sums)
    relative = relative / relative.median(1, keepdim=True).values
    return {
        "smallest_normaliser": float(relative.min()),
        "small_normalisers": float((relative < 1e-3).double().mean()),
        "largest_product": largest,
    }


def examine(state: dict[str, Any], device: str, examples: int, batch_size: int) -> dict[str, float]:
    """Return every measure of the weights of one epoch.

    Args:
        state: what `--save-weights` wrote.
        device: where to compute. Without a GPU there is no measure with Triton's kernels.
        examples: of the test, and of the training data.
        batch_size: examples per forward pass.
    """
    run = Run(**state["run"])
    test = mqar.make_examples(run.spec, examples, seed=run.data_seed, split="test", device=device)
    train = mqar.make_examples(run.spec, examples, seed=run.data_seed, device=device)
    result = {"epoch": state["measured"]["epoch"], "logged_accuracy": state["measured"]["accuracy"]}
    result["logged_loss"] = state["measured"]["loss"]
    backends = ["eager", *(["triton"] if device.startswith("cuda") else [])]
    for backend in backends:
        model = run.new_model(backend).to(device).eval()
        model.load_state_dict(state["model"])
        bf16 = backend == "triton"
        for name, data in (("test", test), ("train", train)):
            for dropout in (False, True):
                torch.manual_seed(0)
                found = measure(model, data, bf16=bf16, dropout=dropout, batch_size=batch_size)
                kind = f"{backend}_{name}" + ("_dropout" if dropout else "")
                result |= {f"{kind}_{measured}": value for measured, value in found.items()}
        if backend == "eager" and isinstance(model.base_model.layers[1].self_attn, ReBasedLinearAttention):
            result |= normaliser(model, test[:2])
    return result


def table(results: list[dict[str, float]]) -> str:
    """Return the measures as a table in Markdown, a column per epoch."""
    names = list(results[0])[1:]
    lines = ["| epoch | " + " | ".join(f"{result['epoch']:g}" for result in results) + " |"]
    lines.append("| --- |" + " --: |" * len(results))
    for name in names:
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{result[name]:.4g}" for result in results) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure the epochs that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("folder", metavar="DIR", help="the folder of a run, with files epoch-N.pt")
    add("--epochs", type=list_of(count), help="which, with commas; default: around the deepest fall")
    add("--examples", type=count, default=512, help="of the test and of the training data")
    add("--batch-size", type=count, default=64, help="examples per forward pass")
    add("--device", type=known_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--output", metavar="FILE", help="also write the measures there, one line of JSON per epoch")
    args = parser.parse_args(with_dashes(argv))
    try:
        files = saved_epochs(args.folder)
    except FileNotFoundError as error:
        parser.error(str(error))

    def load(epoch: int) -> dict[str, Any]:
        return torch.load(files[epoch], map_location="cpu", weights_only=True)

    epochs = args.epochs or choose_epochs({epoch: load(epoch)["measured"]["accuracy"] for epoch in files})
    if missing := [str(epoch) for epoch in epochs if epoch not in files]:
        parser.error(f"--epochs: {args.folder} has no weights of {', '.join(missing)}")
    results = [examine(load(epoch), args.device, args.examples, args.batch_size) for epoch in epochs]
    print(table(results))
    if args.output:
        write_text(args.output, "".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()

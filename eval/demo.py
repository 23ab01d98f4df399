"""Load the small trained model, let it write two short stories, and score it with lm-eval.

The demo then scores a model of two layers on the paper's own task, associative recall.

    python -m modeling_rebased.eval.demo                 # `make demo` installs what it needs first
    python -m modeling_rebased.eval.demo --checkpoint FOLDER --task TASK --prompt "It was"
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from modeling_rebased.training.arguments import HelpFormatter, with_dashes
from modeling_rebased.training.values import count

from .tasks import tasks_path


CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}  # the checkpoint's own settings are greedy
PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "One rainy day, Tom the mouse found a red umbrella in the garden.",
)


def write(checkpoint: Path, prompts: list[str], new_tokens: int) -> None:
    """Load the checkpoint as any user would, and print how it continues each prompt, word by word as it goes."""
    torch.set_num_threads(1)  # a step of one token is too small to share out: threads would only wait for each other
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(model.config.layer_types).items())
    print(f"{checkpoint.name}: {model.num_parameters() / 1e6:.2f}M parameters, layers: {kinds}")
    print(f"loaded in {time.perf_counter() - started:.1f} s\n")
    for seed, prompt in enumerate(prompts):
        set_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        started = time.perf_counter()
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        output = model.generate(**inputs, streamer=streamer, max_new_tokens=new_tokens, **SAMPLING)
        produced = output.shape[1] - inputs["input_ids"].shape[1]
        print(f"[{produced} tokens, {produced / (time.perf_counter() - started):.0f} per second]\n")


def run_with_clock(command: list[str], environment: dict[str, str], log: Path, every: float = 5.0) -> tuple[int, str]:
    """Run a command, show the seconds that it has taken so far, and return its status and what it said.

    Args:
        command, environment: as for `subprocess.Popen`.
        log: a file for what the command says.
        every: seconds between two signs of life: one line that is written over on a terminal, a line each elsewhere.
    """
    started = time.perf_counter()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while True:
            try:
                status = process.wait(timeout=every)
                break
            except subprocess.TimeoutExpired:
                end = "\r" if sys.stdout.isatty() else "\n"
                print(f"scoring: {time.perf_counter() - started:.0f} s so far", end=end, flush=True)
    return status, log.read_text(encoding="utf-8", errors="replace")


def score(checkpoint: Path, task: str, *options: str) -> dict[str, float]:
    """Run one task by lm-eval's command line, offline, and return its metrics by name."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"]
        command += ["--include_path", tasks_path(), "--tasks", task, *options]
        print("$ lm-eval", shlex.join(command[3:]), flush=True)
        command += ["--output_path", folder]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        status, said = run_with_clock(command, environment, Path(folder) / "log")
        if status != 0:
            raise SystemExit(f"lm-eval failed:\n{said[-6000:]}")
        (path,) = Path(folder).rglob("results_*.json")
        result = json.loads(path.read_text(encoding="utf-8"))["results"][task]
    print(f"scored in {time.perf_counter() - started:.0f} s")
    return {name.removesuffix(",none"): value for name, value in result.items() if name.endswith(",none")}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINTS / "stories-12m", help="folder of the model")
    parser.add_argument("--task", default="heldout_stories", help="lm-eval task to score the model on")
    parser.add_argument("--prompt", nargs="*", default=list(PROMPTS), help="beginnings of the stories")
    parser.add_argument("--new-tokens", type=count, default=300, help="most tokens of a story")
    parser.add_argument("--limit", type=count, default=100, help="documents to score")
    args = parser.parse_args(with_dashes())
    for folder in (args.checkpoint, CHECKPOINTS / "mqar-d128"):
        if not (folder / "config.json").is_file():
            parser.error(
                f"{folder} holds no model. The demo needs a checkout of the repository, whose folder checkpoints/ has "
                "the two models; --checkpoint FOLDER names another language model."
            )
    if importlib.util.find_spec("lm_eval") is None:
        parser.error("the demo scores with lm-eval, which is not installed: pip install 'modeling-rebased[eval]'")

    write(args.checkpoint, args.prompt, args.new_tokens)
    figures = score(args.checkpoint, args.task, "--limit", str(args.limit))
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        print(f"{name:>16}: {figures[name]:.4f}")
    print()
    recall = score(CHECKPOINTS / "mqar-d128", "mqar_256_64", "--metadata", '{"num_examples": 16, "queries": 8}')
    print(f"{'recalled':>16}: {recall['acc']:.4f} of 128 queries, 64 pairs in 256 tokens")
    print(f"\nThe model loaded, wrote, and was scored on the first {args.limit} documents of {args.task}.")


if __name__ == "__main__":
    main()

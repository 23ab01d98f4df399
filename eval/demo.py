"""The main job in one command: load the small trained model, let it write English, score it with lm-eval.

python -m eval.demo                 # in a checkout; `make demo` installs what it needs first
python -m eval.demo --checkpoint FOLDER --prompt "It was"
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from .tasks import tasks_path


CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "english-6m"
PROMPTS = ("The old man looked at the sea, and", "My fellow citizens, ")


def write(checkpoint: Path, prompts: list[str], new_tokens: int) -> None:
    """Load the checkpoint as any user would, and stream a continuation of each prompt to the terminal."""
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
        output = model.generate(**inputs, streamer=streamer, max_new_tokens=new_tokens)
        produced = output.shape[1] - inputs["input_ids"].shape[1]
        print(f"[{produced} bytes, {produced / (time.perf_counter() - started):.0f} a second]\n")


def score(checkpoint: Path, limit: int) -> dict[str, float]:
    """Run lm-eval's command line on the task heldout_english, offline, and return its three figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"]
        command += ["--include_path", tasks_path(), "--tasks", "heldout_english", "--limit", str(limit)]
        print("$ lm-eval", *command[3:])
        command += ["--output_path", folder]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"lm-eval failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        (path,) = Path(folder).rglob("results_*.json")
        result = json.loads(path.read_text(encoding="utf-8"))["results"]["heldout_english"]
    return {name: result[f"{name},none"] for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompt", nargs="*", default=list(PROMPTS))
    parser.add_argument("--new_tokens", type=int, default=300)
    parser.add_argument("--limit", type=int, default=7, help="documents to score; 8 takes in the novel: all there is")
    args = parser.parse_args()

    write(args.checkpoint, args.prompt, args.new_tokens)
    started = time.perf_counter()
    figures = score(args.checkpoint, args.limit)
    print(f"scored in {time.perf_counter() - started:.0f} s\n")
    for name, value in figures.items():
        print(f"{name:>16}: {value:.4f}")
    print(f"\nThe model loaded, wrote, and was scored on the first {args.limit} of the held-out documents.")


if __name__ == "__main__":
    main()

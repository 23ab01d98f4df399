"""Make a ReBased model from a softmax model, and train it to match the original.

python examples/linearize.py SmolLM2-135M-Instruct/ output/smollm2 --train_file text.txt --eval_file held_out.txt
"""

import argparse
from pathlib import Path

from modeling_rebased.conversion import linearize
from modeling_rebased.conversion.distill import main as distill


def main() -> None:
    """Read the command line, convert, and train both stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("teacher", help="folder of a Llama, SmolLM, Mistral, Qwen2 or Qwen3 model")
    parser.add_argument("output", type=Path, help="folder for the start and for the results of both stages")
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--eval_file", required=True, help="a text file that is not trained on")
    parser.add_argument("--layers", default="window", help="pure, window, hybrid, or a list of layer types")
    parser.add_argument("--steps", type=int, default=1000, help="training steps per stage")
    parser.add_argument("--context_length", type=int, help="tokens per training example; default: as published")
    arguments = parser.parse_args()

    student = arguments.output / "start"
    linearize(arguments.teacher, student, layers=arguments.layers)
    # First each layer learns the teacher's attention by itself, then the whole student the teacher's next token.
    for stage in ("transfer", "logits"):
        options = {
            "stage": stage,
            "teacher": arguments.teacher,
            "student": student,
            "train_file": arguments.train_file,
            "eval_file": arguments.eval_file,
            "output_dir": arguments.output / stage,
            "max_steps": arguments.steps,
            "report_to": "none",
        }
        if arguments.context_length is not None:
            options["context_length"] = arguments.context_length
        command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        if distill(command) != 0:
            raise SystemExit(f"stage {stage} failed")
        student = arguments.output / stage / "final"
    print(f"The finished model is in {student}")


if __name__ == "__main__":
    main()

"""Make a ReBased model from a softmax model, and train it to match the original.

python examples/linearize.py SmolLM2-135M-Instruct/ output/smollm2 --train_file text.txt --eval_file held_out.txt
"""

import argparse
from pathlib import Path

from modeling_rebased.conversion import linearize
from modeling_rebased.conversion.distill import main as distill


def main() -> None:
    """Read the command line, convert, and train both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="folder of a Llama, SmolLM, Mistral, Qwen2 or Qwen3 model")
    parser.add_argument("output", type=Path, help="folder for the start and for the results of both stages")
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--eval_file", required=True, help="a text file that is not trained on")
    parser.add_argument("--layers", default="window", help="pure, window, hybrid, or a list of layer types")
    parser.add_argument("--feature_dim", type=int, default=64, help="F, at most the size of the teacher's heads")
    parser.add_argument("--steps", type=int, default=1000, help="training steps per stage")
    parser.add_argument("--context_length", type=int, default=1024, help="tokens per training example")
    arguments = parser.parse_args()

    student = arguments.output / "start"
    linearize(arguments.teacher, student, layers=arguments.layers, feature_dim=arguments.feature_dim)
    # First each layer learns the teacher's attention by itself, then the whole student the teacher's next token.
    for stage, learning_rate in (("transfer", "1e-2"), ("logits", "6e-4")):
        options = {
            "stage": stage,
            "teacher": arguments.teacher,
            "student": student,
            "train_file": arguments.train_file,
            "eval_file": arguments.eval_file,
            "output_dir": arguments.output / stage,
            "max_steps": arguments.steps,
            "context_length": arguments.context_length,
            "learning_rate": learning_rate,
            "report_to": "none",
        }
        command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        if distill(command) != 0:
            raise SystemExit(f"stage {stage} failed")
        student = arguments.output / stage / "final"
    print(f"The finished model is in {student}")


if __name__ == "__main__":
    main()

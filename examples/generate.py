"""Continue several prompts at once with a trained model.

python examples/generate.py
python examples/generate.py --model FOLDER --prompt "It was" --new_tokens 50
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def generate(folder: str, prompts: list[str], new_tokens: int) -> list[str]:
    """Load the model in `folder` and return each prompt with its continuation.

    Prompts of different lengths are padded on the left, so that every row ends with the last token of its prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.85)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def main() -> None:
    """Read the command line and print the texts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="checkpoints/english-6m", help="folder or name on the Hub")
    parser.add_argument("--prompt", nargs="+", default=["My fellow citizens, ", "The sea"], help="one text per prompt")
    parser.add_argument("--new_tokens", type=int, default=100, help="tokens to add to each prompt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    for text in generate(arguments.model, arguments.prompt, arguments.new_tokens):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()

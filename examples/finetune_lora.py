"""Fine-tune a trained model on a text file with LoRA adapters, and save the merged model.

python examples/finetune_lora.py --train_file README.md --output output/lora --steps 20
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator


# Every linear map of a mixer; an entry without a match in the model is ignored.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "proj", "in_proj", "out_proj", "window_q_proj", "window_k_proj"]


class Blocks(Dataset):
    """Cut a text into blocks of `length` tokens, which are also their own labels: the model shifts them."""

    def __init__(self, token_ids: list[int], length: int):
        self.rows = [token_ids[i : i + length] for i in range(0, len(token_ids) - length + 1, length)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    """Read the command line, train, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="checkpoints/english-6m", help="folder or name on the Hub")
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--output", required=True, help="folder of the merged model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--context_length", type=int, default=256, help="tokens per training example")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    dtype = "auto" if torch.cuda.is_available() else torch.float32  # on many CPUs bfloat16 is far slower
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True, dtype=dtype)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS))
    model.print_trainable_parameters()
    with open(arguments.train_file, encoding="utf-8") as file:
        blocks = Blocks(tokenizer(file.read())["input_ids"], arguments.context_length)
    options = {"max_steps": arguments.steps, "learning_rate": 1e-3, "logging_steps": 10, "save_strategy": "no"}
    training = TrainingArguments(arguments.output, per_device_train_batch_size=4, report_to="none", **options)
    Trainer(model, training, train_dataset=blocks, data_collator=default_data_collator).train()
    model.merge_and_unload().save_pretrained(arguments.output)  # the adapters become part of the weights
    tokenizer.save_pretrained(arguments.output)
    print(f"The fine-tuned model is in {arguments.output}")


if __name__ == "__main__":
    main()

"""Make text to distil on: what the softmax model itself answers to plain requests.

    python -m modeling_rebased.conversion.answers --teacher SmolLM2-135M-Instruct/ --topics text.txt \\
        --count 1024 --output answers.npy
    python -m modeling_rebased.conversion.distill --stage logits ... --train_file text.txt answers.npy

A student that reads only books forgets how to answer. The requests are templates, filled with the longer words of a
text. The answers are sampled in the teacher's own chat format and stored as token ids. As with documents, an
end-of-text token stands before each dialogue. The prompts that students are compared on are not among these requests.
"""

import argparse
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rebased.training.arguments import with_dashes
from modeling_rebased.training.sampling import chat, sample
from modeling_rebased.training.text import TokenBlocks

from .report import progress


REQUESTS = (
    "What does the word {0} mean?",
    "Write a short paragraph about {0}.",
    "Explain {0} to a ten-year-old.",
    "Tell me a story in which {0} and {1} matter.",
    "What is the difference between {0} and {1}?",
    "Give me five facts about {0}.",
    "Write a poem about {0}.",
    "Why do people care about {0}?",
    "How would you describe {0} to somebody who has never heard of it?",
    "Write a letter to a friend about {0}.",
    "List the advantages and disadvantages of {0}.",
    "I am worried about {0}. What should I do?",
    "Use the words {0}, {1} and {2} in a sentence each.",
    "What questions should I ask before I decide about {0}?",
    "Give me step-by-step instructions that have to do with {0}.",
    "Write a dialogue between a teacher and a student about {0}.",
    "Who would be interested in {0}, and why?",
    "Summarize what is known about {0} in three sentences.",
    "Hello! Can you help me with {0}?",
    "Write a Python function that has something to do with {0}.",
)


def topics(text: str, count: int) -> list[str]:
    """Return the most frequent lower-case words of six letters or more, the most frequent first."""
    return [word for word, _ in Counter(re.findall(r"\b[a-z]{6,}\b", text)).most_common(count)]


def requests(words: list[str], count: int, seed: int = 0) -> list[str]:
    """Return `count` requests about words drawn at random, with the templates in turn."""
    draw = random.Random(seed)
    return [REQUESTS[i % len(REQUESTS)].format(*draw.sample(words, 3)) for i in range(count)]


def sample_answers(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    new_tokens: int = 256,
    batch_size: int = 1024,
    temperature: float = 0.8,
) -> list[int]:
    """Return the token ids of the dialogues, one after another.

    Args:
        teacher: a model with a chat format.
        tokenizer: its tokenizer, with a chat template.
        prompts: what the user says.
        new_tokens: the greatest length of an answer.
        batch_size: dialogues at once.
        temperature: of the sampling.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for start in progress(range(0, len(prompts), batch_size), "answers"):
        inputs = chat(tokenizer, prompts[start : start + batch_size])
        prompt_ids, masks = inputs["input_ids"], inputs["attention_mask"].bool()
        answers = sample(teacher, inputs, end, new_tokens=new_tokens, temperature=temperature, top_k=0, top_p=0.95)
        for prompt, mask, (answer, _) in zip(prompt_ids, masks, answers):
            ids += [end, *prompt[mask].tolist(), *answer]
    return ids


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the softmax model")
    parser.add_argument("--topics", required=True, help="text file, or .npy file of token ids, to take words from")
    parser.add_argument("--count", type=int, default=1024, help="requests (default: 1024)")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most (default: 256)")
    parser.add_argument("--batch-size", type=int, default=1024, help="dialogues at once (default: 1024)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampling (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, type=Path, help="the .npy file to write")
    arguments = parser.parse_args(with_dashes(argv))
    if arguments.output.suffix != ".npy":
        sys.exit(f"--output is {arguments.output}; it must end in .npy.")

    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(
        arguments.teacher, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    ).to(device)
    text = tokenizer.decode(TokenBlocks([arguments.topics], tokenizer, 1).tokens[:1_000_000].tolist())
    words = topics(text, 2000)
    if len(words) < 3:
        sys.exit(f"--topics {arguments.topics} has fewer than three words of six letters.")
    ids = sample_answers(
        teacher.eval(),
        tokenizer,
        requests(words, arguments.count, arguments.seed),
        new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
        temperature=arguments.temperature,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial.npy")
    np.save(partial, np.array(ids, dtype=np.uint16 if len(tokenizer) <= 2**16 else np.uint32))
    partial.rename(arguments.output)
    print(f"{len(ids)} tokens of {arguments.count} dialogues in {arguments.output}")


if __name__ == "__main__":
    main()

"""A softmax model that reads bytes, as a teacher of the conversion's tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_teacher(**fields) -> LlamaForCausalLM:
    """A Llama of two layers, for the vocabulary of `byte_tokenizer`."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "tie_word_embeddings": True, **fields}))

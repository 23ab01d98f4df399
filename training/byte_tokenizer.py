"""Make a byte-level tokenizer, which has no vocabulary to learn: token i is byte i, and two special tokens follow.

    python -m modeling_rebased.training.byte_tokenizer tokenizer/

writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer` loads without remote code. ByT5's tokenizer is
byte-level too, but it is made for an encoder: it ends every text with </s>. A language model given such a prompt would
continue a text that has just ended. Here a text is encoded as its bytes and nothing else.

A prompt is taken as the middle of a document: no end-of-text token is put before it, by the tokenizer, by the demo or
by lm-eval. Write "<|endoftext|>" at the start of a prompt that begins a document. Where whole documents are scored
(`heldout_english`, `rebased_ppl`, `recall_slices`) the token stands before each of them, as in training.
"""

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .text import END_OF_TEXT  # id 256: stands before every document in training, and ends what the model writes


PAD = "<|pad|>"  # id 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: ids 0 to 255 are UTF-8's bytes, 256 is <|endoftext|> (bos and eos), 257 is <|pad|>."""
    # The ByteLevel pre-tokenizer writes each byte as one printable character: printable bytes as themselves,
    # the others, in order, as the characters from 256 on (GPT-2's table).
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",  # what generate continues is the end of each row
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m modeling_rebased.training.byte_tokenizer OUTPUT_FOLDER")
    byte_tokenizer().save_pretrained(sys.argv[1])

"""Read GGUF files with transformers, and refuse what transformers would pass over."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .report import ConversionError


def check_gguf(path: Path, theirs: PreTrainedConfig) -> None:
    """Check that transformers reads all of a GGUF file, and read the size of a head, which it does not always do.

    Without a warning, transformers passes over unknown tensors, scaled rotary embeddings (such as those of Llama 3.1,
    whose factors are a tensor) and sliding windows. It also assumes that Qwen3's heads have 128 numbers.

    Args:
        path: the file.
        theirs: the configuration that transformers made of it. Its `head_dim` is set here.

    Raises:
        ConversionError: transformers would pass over something; the message names it.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()

    def read(name: str) -> Any:
        field = reader.fields.get(f"{kind}.{name}")
        return None if field is None else field.contents()

    head_dim = read("attention.key_length")
    if isinstance(head_dim, int):
        theirs.head_dim = head_dim
    rotated = read("rope.dimension_count")
    size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    wrong = [
        f"{name} {value!r}"
        for name, value, plain in (
            ("rope.dimension_count", rotated, (None, size)),
            ("rope.scaling.type", read("rope.scaling.type"), (None, "none")),
            ("attention.sliding_window", read("attention.sliding_window"), (None, 0)),
        )
        if value not in plain
    ]
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), None)
    if arch is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(theirs)
        names = gguf.get_tensor_name_map(arch, theirs.num_hidden_layers)
        read_names = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
        for tensor in reader.tensors:
            unscaled = tensor.name == "rope_freqs.weight" and (tensor.data == 1).all()
            if tensor.name not in read_names and not unscaled:
                wrong.append(f"the tensor {tensor.name!r}")
    if wrong:
        raise ConversionError(
            f"SOURCE {str(path)!r} has what transformers does not read of a GGUF file, {', '.join(wrong[:5])}, so "
            "that its model would be another one; give the folder with safetensors that the file was made from."
        )


def gguf_tokenizer(folder: Path, options: dict[str, Any], theirs: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a GGUF file, or `None` if it has none that transformers can read."""
    try:
        tokens = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:  # the library raises what it likes; a model without a tokenizer is still a model
        return None
    # transformers 5.17 takes the beginning of a text for its end, and forgets the padding; the configuration is right.
    for name in ("bos", "eos", "pad"):
        token_id = getattr(theirs, f"{name}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            setattr(tokens, f"{name}_token", tokens.convert_ids_to_tokens(token_id))
            tokens.init_kwargs.pop(f"{name}_token_id", None)
    return tokens

"""Make text to distil on from a language model itself: what it samples at temperature 1, kept as shards of token ids.

    rebased-sample SmolLM2-135M-Instruct/ data/sampled --tokens 300000000
    torchrun --nproc-per-node 12 -m modeling_rebased.conversion.sample_teacher ...   # 3 processes for each of 4 GPUs
    rebased-distill ... --train_file data/sampled

`rebased-sample` is `python -m modeling_rebased.conversion.sample_teacher`. A student that is taught by logits learns
what its teacher does on the texts that it reads. The teacher's own samples are the texts that the teacher knows best,
and they need no corpus. A shard is one batch of rows of LENGTH tokens. The rows begin in one of three ways:

    start    the token that begins a document, and nothing else
    opening  that token and the first words of a text, from a list of openings of many registers
    chat     the model's chat format up to the user's first word, so that the model writes both sides of the dialogue

A row does not stop at the end of a document or turn. The model goes on with what it writes next, so all rows are full.

Each shard has its own seed and is written whole, so the same command continues a stopped run, with any number of
processes. A larger --tokens adds shards. Each process takes the GPU of its local rank, in turns if there are more
processes than GPUs. Several processes per GPU may pay for small models, whose steps wait for Python.
"""

import argparse
import contextlib
import fcntl
import hashlib
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

import modeling_rebased  # noqa: F401  a teacher may be a ReBased model
from modeling_rebased.training.arguments import with_dashes
from modeling_rebased.training.resume import weights_identity
from modeling_rebased.training.shards import INDEX, load_index, shard_path, write_index, write_shard

from .reading import load_model


KINDS = ("start", "opening", "chat")
OPENINGS = Path(__file__).with_name("openings.txt")


class RoomyLayer(DynamicLayer):
    """Keep the keys and values of one layer in tensors that have room for all tokens from the start.

    The library's growing layer copies all keys and values for each token, and its static layer makes each step attend
    to all of the room. Here a step attends to a view of what is filled.

    Args:
        length: the number of tokens that there is room for.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.filled = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [B, H_kv, T, D] and return all that are stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.length, key_states.shape[3])
            self.room = key_states.new_empty(shape), value_states.new_empty(*shape[:3], value_states.shape[3])
        first, self.filled = self.filled, self.filled + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, first : self.filled] = new
        self.keys, self.values = (room[:, :, : self.filled] for room in self.room)
        return self.keys, self.values


@torch.no_grad()
def sample_rows(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    length: int,
    temperature: float,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return rows that begin with `prompts` and go on with samples, int64 [B, length].

    Args:
        model: a softmax model.
        prompts: int64 [B, T], without padding, with T < length.
        length: tokens of a row.
        temperature: of the sampling.
        generator: on the model's device.
        vocab_size: only tokens below this are drawn. By default all of the model's, of which a tokenizer may lack the
            last ones.
    """
    rows = torch.empty(prompts.shape[0], length, dtype=torch.int64, device=model.device)
    begun = prompts.shape[1]
    rows[:, :begun] = prompts
    cache = Cache(layers=[RoomyLayer(length - 1) for _ in range(model.config.num_hidden_layers)])
    for position in range(begun, length):
        new = rows[:, :begun] if position == begun else rows[:, position - 1 : position]
        logits = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits = logits[:, -1, :vocab_size].float()
        # The largest of logits minus log of exponential noise is a sample (Gumbel), and the host need not wait for it.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        rows[:, position] = (logits / temperature - noise.log_()).argmax(-1)
    return rows


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that begins a document: <|endoftext|>, or the tokenizer's first or last token of a text.

    Raises:
        ValueError: the tokenizer has none of them.
    """
    found = [tokenizer.get_vocab().get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id]
    for token in found:
        if token is not None:
            return token
    raise ValueError("TEACHER's tokenizer has no token that begins a document.")


def before_user(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of the chat format that stand before what the user says first.

    Raises:
        ValueError: the tokenizer has no chat template, or one that changes what the user says.
    """
    said = "<what the user says>"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False)
    except ValueError as error:
        raise ValueError(f"TEACHER has no chat format, so the share of chats must be 0: {error}") from error
    before, found, _ = text.partition(said)
    if not found:
        raise ValueError("TEACHER's chat template changes what the user says, so the share of chats must be 0.")
    return tokenizer(before, add_special_tokens=False)["input_ids"]


class Prompts:
    """Make the beginnings of the rows of a shard.

    Args:
        tokenizer: the teacher's.
        openings: beginnings of texts.
        shares: the share of each of `KINDS`; they need not add up to 1.
        seed: of the choice of openings.

    Raises:
        ValueError: the tokenizer lacks what a share above 0 needs, or no share is above 0.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, openings: Sequence[str], shares: Sequence[float], seed: int
    ) -> None:
        if not all(0 <= share < math.inf for share in shares) or sum(shares) == 0:
            raise ValueError(f"--shares is {shares}; each must be a number of at least 0, and one must be positive.")
        if shares[1] and len(openings) == 0:
            raise ValueError("--openings holds no opening.")
        self.shares, self.seed = shares, seed
        self.start = start_token(tokenizer)
        self.openings = tokenizer(list(openings), add_special_tokens=False)["input_ids"] if openings else []
        self.chat = before_user(tokenizer) if shares[2] else []

    def kind(self, number: int) -> str:
        """Return the kind of a shard: the kinds alternate so that every run of shards has about the right shares."""
        place = (number + 0.5) * (math.sqrt(5) - 1) / 2 % 1 * sum(self.shares)
        for kind, share in zip(KINDS, self.shares):
            if place < share:
                return kind
            place -= share
        return next(kind for kind, share in zip(KINDS, self.shares) if share)

    def __call__(self, number: int, rows: int) -> torch.Tensor:
        """Return the beginnings of the rows of shard `number`, int64 [rows, T]."""
        kind = self.kind(number)
        if kind != "opening":
            return torch.tensor([[self.start] if kind == "start" else self.chat]).repeat(rows, 1)
        draw = random.Random(f"{self.seed} {number}")
        words = draw.randint(1, min(8, max(map(len, self.openings))))
        long = [each[:words] for each in self.openings if len(each) >= words]
        return torch.tensor([[self.start, *draw.choice(long)] for _ in range(rows)])


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder's index."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def teacher_tokenizer(teacher: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a teacher whose layers all have full softmax attention.

    Raises:
        ValueError: they have not, or there is no model or no tokenizer.
    """
    try:
        config = AutoConfig.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        raise ValueError(f"TEACHER {str(teacher)!r} is no folder of a model: {error}") from error
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    if others:
        raise ValueError(f"TEACHER must have full softmax attention in every layer, but its cache has {others}.")
    try:
        return AutoTokenizer.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        raise ValueError(f"TEACHER {str(teacher)!r} has no tokenizer: {error}") from error


def read_openings(path: str | os.PathLike) -> list[str]:
    """Return the lines of a file that are not blank.

    Raises:
        ValueError: the file cannot be read, or is no text in UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--openings {path} cannot be read: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def check_made_by(folder: Path, made_by: dict[str, Any]) -> None:
    """Refuse a folder whose index says that its shards were made in another way.

    Raises:
        ValueError: names the settings that differ.
    """
    if (folder / INDEX).exists():
        known = load_index(folder).get("made_by", {})
        other = [f"{name} {known.get(name)!r}" for name, value in made_by.items() if known.get(name) != value]
        if other:
            raise ValueError(f"{folder} holds shards of other settings: {', '.join(other)}.")


def _check_numbers(tokens: int, batch_size: int, temperature: float, max_seconds: float) -> None:
    for name, number in (("--tokens", tokens), ("--batch-size", batch_size), ("--temperature", temperature)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} is {number}; it must be positive and finite.")
    if not max_seconds > 0:
        raise ValueError(f"--max-seconds is {max_seconds}; it must be positive.")


def sample_shards(
    teacher: str | os.PathLike,
    output: str | os.PathLike,
    *,
    tokens: int,
    length: int = 2048,
    batch_size: int = 512,
    shares: Sequence[float] = (0.4, 0.3, 0.3),
    openings: str | os.PathLike = OPENINGS,
    temperature: float = 1.0,
    seed: int = 0,
    max_seconds: float = math.inf,
    rank: int = 0,
    world_size: int = 1,
    device: str | None = None,
) -> int:
    """Sample the shards of this process that are not there yet.

    Args:
        teacher: folder of a softmax model with its tokenizer.
        output: folder of the shards.
        tokens: of all shards and processes. They are rounded up to whole shards.
        length: tokens of a row, at most the teacher's max_position_embeddings.
        batch_size: rows of a shard.
        shares: of shards whose rows begin with the start token, an opening, or a chat.
        openings: text file with an opening per line.
        temperature: of the sampling.
        seed: of everything random.
        max_seconds: no shard begins after so long.
        rank, world_size: this process and how many there are. It takes the shards whose number is `rank` modulo
            `world_size`.
        device: by default a GPU if there is one.

    Returns:
        The number of tokens that this process sampled.

    Raises:
        ValueError: an argument is wrong, or `output` holds shards of other settings.
    """
    _check_numbers(tokens, batch_size, temperature, max_seconds)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUTPUT {folder} is a file; it must be a folder, or a new one.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = teacher_tokenizer(teacher)
    lines = read_openings(openings)
    prompts = Prompts(tokenizer, lines, shares, seed)
    longest = max(9, len(prompts.chat)) + 1
    if length < longest:
        raise ValueError(f"--length is {length}; it must be at least {longest}, for the longest prompt and a token.")
    made_by = {
        "program": "rebased-sample",
        "teacher (a hash of its weights)": weights_identity(teacher),
        "length": length,
        "batch_size": batch_size,
        "shares": dict(zip(KINDS, shares)),
        "openings (a hash)": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        "temperature": temperature,
        "seed": seed,
    }
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load_model(AutoModelForCausalLM, teacher, f"TEACHER {str(teacher)!r}", dtype=dtype).to(device).eval()
    positions = model.config.max_position_embeddings
    if length > positions:
        raise ValueError(f"--length is {length}; it must be at most {positions}, the length that TEACHER is made for.")
    with locked(folder):
        check_made_by(folder, made_by)
        write_index(folder, tokenizer, made_by)

    began, sampled = time.monotonic(), 0
    for number in range(rank, -(-tokens // (batch_size * length)), world_size):
        if time.monotonic() - began > max_seconds:
            break
        if shard_path(folder, number).exists():
            continue
        started = time.monotonic()
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
        begun = prompts(number, batch_size).to(device)
        rows = sample_rows(model, begun, length, temperature, generator, len(tokenizer))
        with locked(folder):
            write_shard(folder, number, rows.flatten().cpu().numpy(), len(tokenizer))
            total = write_index(folder, tokenizer, made_by)
        sampled += rows.numel()
        seconds = time.monotonic() - started
        print(
            f"process {rank}: shard {number} ({prompts.kind(number)}): {rows.numel() / seconds:,.0f} tokens/s. "
            f"There are {total:,} of {tokens:,} tokens",
            flush=True,
        )
    seconds = time.monotonic() - began
    print(
        f"process {rank} of {world_size}: {sampled:,} tokens in {seconds:.1f} s, "
        f"{sampled / max(seconds, 1e-9):,.0f} tokens per second",
        flush=True,
    )
    return sampled


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="rebased-sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("teacher", help="folder of the softmax model; linearize makes it of a GGUF file")
    parser.add_argument("output", type=Path, help="folder of the shards")
    parser.add_argument("--tokens", type=int, required=True, help="of all shards, rounded up to whole ones")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=512, help="rows of a shard, sampled at once (default: 512)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=[0.4, 0.3, 0.3],
        metavar=tuple(each.upper() for each in KINDS),
        help="shares of the kinds of rows (default: 0.4 0.3 0.3)",
    )
    parser.add_argument("--openings", type=Path, default=OPENINGS, help="text file with an opening per line")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="begin no shard after so long")
    arguments = parser.parse_args(with_dashes(argv))
    place = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', place['RANK'])) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    try:
        sample_shards(**vars(arguments), rank=place["RANK"], world_size=place["WORLD_SIZE"], device=device)
    except (ValueError, OSError) as error:
        print(f"rebased-sample: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

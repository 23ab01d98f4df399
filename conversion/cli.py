"""Convert checkpoints of other code into ReBased models and back: the command rebased-convert.

    rebased-convert COMMAND SOURCE [DESTINATION] [options]
    python -m modeling_rebased.conversion.cli ...               # the same in a checkout

`rebased-convert COMMAND --help` explains a command, with examples. An output appears only when it is complete. After
an error there is none.
"""

import argparse
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from modeling_rebased.training.arguments import with_dashes

from .authors import from_authors, to_authors
from .based import from_based
from .fla import from_fla, to_fla
from .hub import export
from .kernels import export_kernels
from .linearize import linearize
from .report import ConversionError
from .to_rebased import to_rebased
from .verify import verify


EXAMPLES = {
    "from-authors": """\
  rebased-convert from-authors best.pt out/ --num-heads 12
  rebased-convert from-authors based.pt out/ --num-heads 12 --kernel based
  rebased-convert from-authors plain.pt out/ --num-heads 12 --kernel rebased --no-normalize
  rebased-convert from-authors lightning.ckpt out/ --num-heads 12 --dry-run""",
    "to-authors": """\
  rebased-convert to-authors out/ again.pt
  rebased-convert to-authors out/ again.pt --dry-run""",
    "from-fla": """\
  rebased-convert from-fla layer.pt out/
  rebased-convert from-fla model.safetensors out/ --norm-eps 1e-5
  rebased-convert from-fla chunk_mode.pt out/ --attention-eps 1e-10 --dry-run""",
    "to-fla": """\
  rebased-convert to-fla out/ again.pt
  rebased-convert to-fla out/ layer3.pt --layer 3
  rebased-convert to-fla out/ stack.safetensors --attention-only""",
    "from-based": """\
  rebased-convert from-based based-360m/ out/ --tokenizer gpt2/
  rebased-convert from-based pytorch_model.bin out/ --num-heads 16 --window-size 128
  rebased-convert from-based based-1b-50b/ out/ --dry-run""",
    "linearize": """\
  rebased-convert linearize SmolLM2-135M-Instruct/ start/ --layers window --window 64
  rebased-convert linearize SmolLM2-135M-Instruct/ start/ --layers hybrid --feature-dim 32
  rebased-convert linearize SmolLM2-135M-Instruct.gguf teacher/ --layers softmax
  rebased-convert linearize teacher/ start/ --layers pure --fit data/sampled
  rebased-convert linearize tiny/ start/ --layers linear_attention,full_attention --dry-run""",
    "to-rebased": """\
  rebased-convert to-rebased based/ start/""",
    "export": """\
  rebased-convert export output/final hub/ --license apache-2.0 --dataset wikitext --language en
  rebased-convert export output/final hub/ --license mit --results lm-eval-output/ --card-text about.md
  rebased-convert export output/final hub/ --license mit --push user/my-rebased --private""",
    "kernels": """\
  rebased-convert kernels rebased-kernels/""",
    "verify": """\
  rebased-convert verify hub/
  rebased-convert verify hub/ --source output/final""",
}


Add = Callable[..., Any]  # ArgumentParser.add_argument


def _options_of_from_authors(add: Add) -> None:
    add("--num-heads", type=int, help="attention heads (12 in the MQAR runs)")
    add("--kernel", choices=["rebased", "based"], help="needed where there is no learnt normalisation to tell")
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="whether q and k are normalised, where no parameter tells",
    )
    add(
        "--use-beta",
        action=argparse.BooleanOptionalAction,
        help="whether a beta beside a gamma is used (default: if it is not all 0)",
    )
    add("--attention-eps", type=float, default=1e-12, help="of the normaliser (default: 1e-12)")
    add("--embedding-dropout", type=float, default=0.0, help="for training on (default: 0)")
    add("--max-position-embeddings", type=int, help="length trained on, without learned positions")


def _options_of_from_fla(add: Add) -> None:
    add("--num-heads", type=int, help="attention heads, where neither gamma nor beta tells")
    add(
        "--normalize", action=argparse.BooleanOptionalAction, help="whether q and k are normalised (default: they are)"
    )
    add("--attention-eps", type=float, default=1e-5, help="the layer's eps (default: 1e-5)")
    add("--norm-eps", type=float, help="of a whole model's RMSNorm (default: 1e-6)")
    add("--max-position-embeddings", type=int, help="length trained on")


def _options_of_to_fla(add: Add) -> None:
    add("--layer", type=int, help="convert this layer alone")
    add("--attention-only", action="store_true", help="convert the attention layers alone")


def _options_of_from_based(add: Add) -> None:
    add("--num-heads", type=int, help="attention heads, where no config.json tells (16 as released)")
    add("--window-size", type=int, help="window_size, where no config.json tells it; a token sees half of it")
    add("--attention-eps", type=float, help="of the normaliser (default: the checkpoint's, or 1e-12)")
    add("--norm-eps", type=float, help="of RMSNorm (default: the checkpoint's, or 1e-5)")
    add("--rope-theta", type=float, help="of the rotary embedding (default: the checkpoint's, or 10000)")
    add("--max-position-embeddings", type=int, help="length trained on (default: the checkpoint's, or 2048)")
    add("--tokenizer", help="folder with GPT-2's tokenizer, which the released models use")


def _options_of_linearize(add: Add) -> None:
    add("--layers", default="window", help="pure, window, hybrid, softmax, or a type for each layer (default: window)")
    add("--feature-dim", type=int, help="size of linear queries and keys (default: 64, or the head's own if smaller)")
    add("--window", type=int, help="tokens that the window sees (default: 64)")
    add(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="whether linear queries and keys are rotated by position (default: where that is possible)",
    )
    add("--decay", choices=["gate"], help="let linear layers learn to forget, by a gate that starts open")
    add("--fit", nargs="+", metavar="TEXT", help="texts to fit the linear layers to, layer by layer")
    add("--fit-tokens", type=int, help="tokens of them that are used (default: 32768)")


def _options_of_export(add: Add) -> None:
    add("--license", help="the Hub's identifier, such as apache-2.0; 'other' needs --license-name")
    add("--license-name", help="of another license")
    add("--license-link", help="address of its text")
    add("--name", help="the model's name in its card")
    add("--dataset", dest="datasets", action="append", help="trained on; may be repeated")
    add("--language", dest="languages", action="append", help="such as en; may be repeated")
    add("--base-model", help="the Hub's name of the model that this one was made from")
    add("--tag", dest="tags", action="append", help="one more tag; may be repeated")
    add(
        "--results",
        action="append",
        help="lm-eval's output: a file, or a folder, of which the newest file of this model is taken; may be repeated",
    )
    add("--card-text", help="Markdown file to stand in the card")
    add("--tokenizer", help="folder with a tokenizer, if SOURCE has none")
    add("--dtype", help="float32, bfloat16 or float16 (default: as it is)")
    add("--max-shard-size", default="5GB", help="of one safetensors file (default: 5GB)")
    add("--push", metavar="USER/NAME", help="upload to this repository of the Hub")
    add("--private", action="store_true", help="create the repository as a private one")


def _options_of_kernels(add: Add) -> None:
    add("--overwrite", action="store_true", help="replace DIR if it exists")


def _options_of_verify(add: Add) -> None:
    add("--source", help="folder of the model it was made from")
    add("--tolerance", type=float, default=1e-5, help="of the logits, in float32 (default: 1e-5)")
    add("--new-tokens", type=int, default=8, help="tokens to generate (default: 8)")
    add("--timeout", type=float, default=900, help="seconds to wait (default: 900)")


FOLDER = "the folder of a ReBased model"
TEACHER = "folder or GGUF file of a Llama, Mistral or Qwen model, or its copy with softmax in every layer"
# The function of each command, what it takes, what it makes, and what adds its options.
COMMANDS: dict[str, tuple[Callable[..., Any], str, str | None, Callable[[Add], None] | None]] = {
    "from-authors": (
        from_authors,
        "checkpoint of the authors' code, a file of torch.save",
        "new folder",
        _options_of_from_authors,
    ),
    "to-authors": (to_authors, FOLDER, "new file, of torch.save", None),
    "from-fla": (from_fla, "state_dict of a layer, layers or a model", "new folder", _options_of_from_fla),
    "to-fla": (to_fla, FOLDER, "new file, of torch.save or .safetensors", _options_of_to_fla),
    "from-based": (from_based, "folder or file of a released Based model", "new folder", _options_of_from_based),
    "linearize": (linearize, TEACHER, "new folder", _options_of_linearize),
    "to-rebased": (to_rebased, "folder of a Based model of this package", "new folder", None),
    "export": (export, FOLDER, "new folder", _options_of_export),
    "kernels": (export_kernels, "new folder", None, _options_of_kernels),
    "verify": (verify, "the folder to load; its own code is run", None, _options_of_verify),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rebased-convert",
        description=__doc__.split("\n")[0],
        epilog="examples:\n" + "\n".join(text.split("\n")[0] for text in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, source, destination, add_options) in COMMANDS.items():
        summary = (inspect.getdoc(function) or "").split("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(function=function)
        if destination is None:
            command.add_argument("folder", metavar="DIR", help=source)
        else:
            command.add_argument("source", metavar="SOURCE", help=source)
            command.add_argument("destination", metavar="DESTINATION", help=destination)
            command.add_argument("--overwrite", action="store_true", help="replace DESTINATION if it exists")
            command.add_argument(
                "--dry-run", action="store_true", help="list what maps where and what is inferred; write nothing"
            )
        if add_options is not None:
            add_options(command.add_argument)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, which is printed, or 2 for wrong usage."""
    arguments = vars(_parser().parse_args(with_dashes(argv)))
    function, _ = arguments.pop("function"), arguments.pop("command")
    # A terminated run cleans up as an interrupted one does.
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if main_thread else None
    try:
        report = function(**arguments)
    except (ConversionError, OSError) as error:
        print(f"rebased-convert: error: {error}", file=sys.stderr)
        return 1
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

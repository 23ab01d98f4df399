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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rebased-convert",
        description=__doc__.split("\n")[0],
        epilog="examples:\n" + "\n".join(text.split("\n")[0] for text in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[..., Any], source: str, destination: str | None) -> argparse.ArgumentParser:
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
        return command

    folder = "the folder of a ReBased model"
    command = add("from-authors", from_authors, "checkpoint of the authors' code, a file of torch.save", "new folder")
    command.add_argument("--num-heads", type=int, help="attention heads (12 in the MQAR runs)")
    command.add_argument(
        "--kernel", choices=["rebased", "based"], help="needed where there is no learnt normalisation to tell"
    )
    command.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="whether q and k are normalised, where no parameter tells",
    )
    command.add_argument(
        "--use-beta",
        action=argparse.BooleanOptionalAction,
        help="whether a beta beside a gamma is used (default: if it is not all 0)",
    )
    command.add_argument("--attention-eps", type=float, default=1e-12, help="of the normaliser (default: 1e-12)")
    command.add_argument("--embedding-dropout", type=float, default=0.0, help="for training on (default: 0)")
    command.add_argument("--max-position-embeddings", type=int, help="length trained on, without learned positions")

    add("to-authors", to_authors, folder, "new file, of torch.save")

    command = add("from-fla", from_fla, "state_dict of a layer, layers or a model", "new folder")
    command.add_argument("--num-heads", type=int, help="attention heads, where neither gamma nor beta tells")
    command.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="whether q and k are normalised (default: they are)"
    )
    command.add_argument("--attention-eps", type=float, default=1e-5, help="the layer's eps (default: 1e-5)")
    command.add_argument("--norm-eps", type=float, default=1e-6, help="of a whole model's RMSNorm (default: 1e-6)")
    command.add_argument("--max-position-embeddings", type=int, help="length trained on")

    command = add("to-fla", to_fla, folder, "new file, of torch.save or .safetensors")
    command.add_argument("--layer", type=int, help="convert this layer alone")
    command.add_argument("--attention-only", action="store_true", help="convert the attention layers alone")

    command = add("from-based", from_based, "folder or file of a released Based model", "new folder")
    command.add_argument("--num-heads", type=int, help="attention heads, where no config.json tells (16 as released)")
    command.add_argument(
        "--window-size", type=int, help="window_size, where no config.json tells it; a token sees half of it"
    )
    command.add_argument("--attention-eps", type=float, help="of the normaliser (default: the checkpoint's, or 1e-12)")
    command.add_argument("--norm-eps", type=float, help="of RMSNorm (default: the checkpoint's, or 1e-5)")
    command.add_argument(
        "--rope-theta", type=float, help="of the rotary embedding (default: the checkpoint's, or 10000)"
    )
    command.add_argument(
        "--max-position-embeddings", type=int, help="length trained on (default: the checkpoint's, or 2048)"
    )
    command.add_argument("--tokenizer", help="folder with GPT-2's tokenizer, which the released models use")

    source = "folder or GGUF file of a Llama, Mistral or Qwen model, or its copy with softmax in every layer"
    command = add("linearize", linearize, source, "new folder")
    command.add_argument(
        "--layers", default="window", help="pure, window, hybrid, softmax, or a type for each layer (default: window)"
    )
    command.add_argument(
        "--feature-dim", type=int, help="size of linear queries and keys (default: 64, or the head's own if smaller)"
    )
    command.add_argument("--window", type=int, default=64, help="tokens that the window sees (default: 64)")
    command.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="whether linear queries and keys are rotated by position (default: where that is possible)",
    )
    command.add_argument(
        "--decay", choices=["gate"], help="let linear layers learn to forget, by a gate that starts open"
    )
    command.add_argument("--fit", nargs="+", metavar="TEXT", help="texts to fit the linear layers to, layer by layer")
    command.add_argument("--fit-tokens", type=int, default=32768, help="tokens of them that are used (default: 32768)")

    add("to-rebased", to_rebased, "folder of a Based model of this package", "new folder")

    command = add("export", export, folder, "new folder")
    command.add_argument("--license", help="the Hub's identifier, such as apache-2.0; 'other' needs --license-name")
    command.add_argument("--license-name", help="of another license")
    command.add_argument("--license-link", help="address of its text")
    command.add_argument("--name", help="the model's name in its card")
    command.add_argument("--dataset", dest="datasets", action="append", help="trained on; may be repeated")
    command.add_argument("--language", dest="languages", action="append", help="such as en; may be repeated")
    command.add_argument("--base-model", help="the Hub's name of the model that this one was made from")
    command.add_argument("--tag", dest="tags", action="append", help="one more tag; may be repeated")
    command.add_argument(
        "--results",
        action="append",
        help="lm-eval's output: a file, or a folder, of which the newest file of this model is taken; may be repeated",
    )
    command.add_argument("--card-text", help="Markdown file to stand in the card")
    command.add_argument("--tokenizer", help="folder with a tokenizer, if SOURCE has none")
    command.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as it is)")
    command.add_argument("--max-shard-size", default="5GB", help="of one safetensors file (default: 5GB)")
    command.add_argument("--push", metavar="USER/NAME", help="upload to this repository of the Hub")
    command.add_argument("--private", action="store_true", help="create the repository as a private one")

    command = add("kernels", export_kernels, "new folder", None)
    command.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")

    command = add("verify", verify, "the folder to load; its own code is run", None)
    command.add_argument("--source", help="folder of the model it was made from")
    command.add_argument("--tolerance", type=float, default=1e-5, help="of the logits, in float32 (default: 1e-5)")
    command.add_argument("--new-tokens", type=int, default=8, help="tokens to generate (default: 8)")
    command.add_argument("--timeout", type=float, default=900, help="seconds to wait (default: 900)")
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

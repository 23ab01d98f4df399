"""rebased-convert: checkpoints of other code into ReBased models, and back.

    rebased-convert COMMAND SOURCE [DESTINATION] [options]      # in a checkout: python -m conversion.cli ...

`rebased-convert COMMAND --help` says what a command takes, with examples. An output appears only when it is complete;
after an error there is none.
"""

import argparse
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .authors import from_authors, to_authors
from .files import ConversionError
from .fla import from_fla, to_fla


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
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rebased-convert",
        description=__doc__.split("\n")[0],
        epilog="examples:\n" + "\n".join(text.split("\n")[0] for text in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[..., Any], source: str, destination: str | None) -> argparse.ArgumentParser:
        summary = inspect.getdoc(function).split("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(function=function)
        command.add_argument("source", metavar="SOURCE", help=source)
        if destination is not None:
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 after an error, which is printed, or 2 for its usage."""
    arguments = vars(_parser().parse_args(argv))
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

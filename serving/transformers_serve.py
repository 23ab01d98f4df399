"""`transformers serve` for ReBased models, where vLLM is not at hand.

    python -m modeling_rebased.serving.transformers_serve [options of `transformers serve`]

`transformers serve` looks a model's class up among transformers' own and knows no other. This program adds ReBased's
classes to them and then is `transformers serve`.
"""

import sys

import transformers
from transformers.cli.transformers import main as transformers_main

import modeling_rebased


def main(arguments: list[str] | None = None) -> None:
    """Run `transformers serve` with these arguments, by default the command line's."""
    for name in modeling_rebased.__all__:
        if name.startswith("ReBased"):
            setattr(transformers, name, getattr(modeling_rebased, name))
    sys.argv = ["transformers", "serve", *(sys.argv[1:] if arguments is None else arguments)]
    transformers_main()


if __name__ == "__main__":
    main()

"""Upload a finished model to the Hub, as `--push_to_hub` of transformers' Trainer asks for.

The Trainer itself would upload its checkpoints, which have neither the model's card nor bf16 weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from .folders import write_text


class HubError(OSError):
    """Signal that the Hub refused or could not be reached."""


def repository_name(args: TrainingArguments) -> str:
    """Return the repository to upload to: --hub_model_id, or as in transformers the name of the run's folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def wrong_hub_argument(args: TrainingArguments) -> str | None:
    """Return what is wrong with the arguments of the Hub, as far as can be known without a connection."""
    if not args.push_to_hub:
        given = [
            name for name in ("hub_model_id", "hub_private_repo", "hub_revision", "hub_token") if getattr(args, name)
        ]
        return f"--{given[0]} is for --push_to_hub True, which is not given" if given else None
    if args.hub_strategy.value not in ("every_save", "end"):
        return f"--hub_strategy {args.hub_strategy.value} is not possible: only the finished model is uploaded"
    try:
        validate_repo_id(repository_name(args))
    except HFValidationError as error:
        argument = "--output_dir (used as --hub_model_id)" if args.hub_model_id is None else "--hub_model_id"
        return f"{argument} {repository_name(args)} is no repository's name: {error}"
    if not (args.hub_token or get_token()):
        return "--push_to_hub needs a token of the Hub: log in with `hf auth login`, or set HF_TOKEN or --hub_token"
    return None


def open_repository(args: TrainingArguments) -> str | None:
    """Return the repository to upload to, which is made if it does not exist; on the main process only.

    This comes before training, so that a wrong name or token does not cost a run. The Trainer's own uploads are
    switched off.

    Returns:
        "user/name", or `None` on other processes and without --push_to_hub.

    Raises:
        HubError: the Hub refused or could not be reached.
    """
    asked, args.push_to_hub = args.push_to_hub, False
    if not asked or args.process_index != 0:
        return None
    name, api = repository_name(args), HfApi(token=args.hub_token)
    try:
        repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_revision is not None:
            api.create_branch(repository, branch=args.hub_revision, exist_ok=True)
    except Exception as error:  # the client's errors have no base but this
        raise HubError(f"--push_to_hub cannot upload to {name!r}: {type(error).__name__}: {error}") from error
    return repository


def upload_finished(args: TrainingArguments, repository: str) -> None:
    """Upload the finished model of a run. The example in its card loads it from the Hub then.

    Raises:
        HubError: the Hub refused or could not be reached. The model stays as it is.
    """
    folder = Path(args.output_dir) / "final"
    card = folder / "README.md"
    if card.exists():
        text = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{repository}"', card.read_text(encoding="utf-8"))
        write_text(card, text)
    try:
        url = HfApi(token=args.hub_token).upload_folder(
            repo_id=repository, folder_path=folder, revision=args.hub_revision, commit_message="Upload the model"
        )
    except Exception as error:  # the client's errors have no base but this
        raise HubError(
            f"{folder} is complete, but its upload to {repository!r} failed: {type(error).__name__}: {error}. The "
            "same command uploads it again"
        ) from error
    print(f"{folder} is uploaded: {url}")

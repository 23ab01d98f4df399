"""Go on with a run where it was stopped, and know when it is finished or when a folder holds another run.

A run writes what decides its result into `OUTPUT_DIR/run.json`: the data, the tokenizer and the model it starts from.
These are compared when the same folder is given again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from .checkpoints import is_sharded, rewrite
from .folders import write_text
from .values import one_line


logger = logging.get_logger(__name__)
RECORD = "run.json"


def latest_complete_checkpoint(output_dir: str | os.PathLike, processes: int = 1) -> str | None:
    """Return the newest checkpoint folder in `output_dir` that was written to its end, or None.

    Trainer writes into the folder's final name, trainer_state.json after the weights, the optimizer and the schedule.
    A process killed meanwhile leaves a folder without that file or with a torn one: it is passed over, with a warning.
    So is a folder with whole random states of fewer than `processes` processes, of which all but the first may write
    later. Their files are archives, which end with an index. A run of one process writes one file of another name,
    before trainer_state.json.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            alone = (folder / "rng_state.pth").exists()
            if not alone and sum(map(zipfile.is_zipfile, folder.glob("rng_state_*.pth"))) < processes:
                raise ValueError("the states of some processes' random number generators are missing")
            if state["global_step"] == int(folder.name.split("-")[1]):
                return str(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(f"{folder} is incomplete and is ignored: {error}")
    return None


class RunError(ValueError):
    """Signal a run that cannot be trained, such as one with a checkpoint that this launch cannot go on from."""


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """Train to the end, from a checkpoint if there is one.

    A checkpoint of the last step is only loaded: Trainer itself would take one step more.

    Raises:
        RunError: FSDP wrote the checkpoint, this launch trains without it, or the other way round, and the checkpoint
            cannot be rewritten. Or it is of another model, or there is no whole batch to train on.
    """
    if checkpoint is not None:
        # Before the model is wrapped. The processes that wait find the checkpoint rewritten.
        with trainer.args.main_process_first(local=False, desc="reading the checkpoint"):
            if is_sharded(Path(checkpoint)) != trainer.is_fsdp_enabled:
                try:
                    rewrite(Path(checkpoint), trainer)
                except (CheckpointException, OSError, KeyError, ValueError) as error:
                    written, now = ("without", "with") if trainer.is_fsdp_enabled else ("with", "without")
                    raise RunError(
                        f"{checkpoint} was written {written} FSDP, this launch trains {now} it, and the checkpoint "
                        f"cannot be rewritten ({error!r}). Launch as before, with any number of processes"
                    ) from error
        logger.warning(f"Resuming from {checkpoint}")
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if 0 < trainer.args.max_steps <= state.global_step:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if checkpoint is None or "loading state_dict" not in str(error):
            raise
        raise RunError(f"--resume_from_checkpoint {checkpoint} holds another model: {one_line(error)}") from error
    if trainer.state.global_step == 0:  # the library only logs it
        raise RunError(
            "nothing was trained: the text holds less than a batch, and a smaller one is left out "
            "(--dataloader_drop_last, or --compile of rebased-distill)"
        )


def weights_identity(folder: str | os.PathLike) -> str:
    """Return a hash of the safetensors in a model's folder, or of the name where that is not of such a folder."""
    identity = hashlib.sha256()
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:  # it is a model's name on the Hub
        identity.update(os.fspath(folder).encode())
    for path in paths:
        identity.update(path.name.encode())
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                identity.update(part)
    return identity.hexdigest()[:16]


class RunRecord:
    """Keep what decides a run's result in its folder.

    Args:
        output_dir: the run's folder.
        identity: by name what another run may not differ in. Values are strings, numbers or JSON objects.
        processes: how many train now. Another number goes on from the same weights.
    """

    def __init__(self, output_dir: str | os.PathLike, identity: dict[str, Any], processes: int = 1) -> None:
        self.path = Path(output_dir) / RECORD
        self.identity = json.loads(json.dumps(identity))
        self.fewest_processes = processes
        self.finished: dict[str, Any] | None = None

    def check(self) -> None:
        """Compare this run with the one whose folder this is, if it is one, and read whether that is finished.

        Raises:
            ValueError: the folder holds another run, or its record cannot be read. The message says what differs.
        """
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            known, self.finished = found["identity"], found.get("finished")
            self.fewest_processes = min(self.fewest_processes, found.get("fewest_processes", self.fewest_processes))
            differences = list(_differences(known, self.identity))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); choose another --output_dir") from error
        if differences:
            raise ValueError(
                f"--output_dir {self.path.parent} holds another run: {'; '.join(differences)}. Choose another folder, "
                "or remove this one"
            )

    def write(self, finished: dict[str, Any] | None = None) -> None:
        """Write the record; at the end of a run with how far it was trained."""
        self.finished = finished or self.finished
        content = {
            "identity": self.identity,
            "fewest_processes": self.fewest_processes,
            "finished": self.finished,
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")

    def is_finished(self, args: TrainingArguments, max_seconds: float | None = None) -> bool:
        """Return whether the run was trained to its end before, and at least as far as is asked now."""
        if self.finished is None or not (self.path.parent / "final" / "config.json").is_file():
            return False
        if max_seconds is not None and self.finished.get("seconds", 0.0) >= max_seconds:
            return True
        if args.max_steps > 0:
            return self.finished["steps"] >= args.max_steps
        return max_seconds is None and self.finished["epochs"] >= args.num_train_epochs - 1e-6

    def __str__(self) -> str:
        if self.finished is None:
            return f"{self.path.parent}: unfinished"
        return f"{self.path.parent / 'final'} is finished, after {self.finished['steps']} steps: nothing is left to do"


def _differences(known: Any, given: Any, name: str = "") -> Any:
    """Yield a phrase for each value that differs."""
    if isinstance(known, dict) and isinstance(given, dict):
        # Another release of the library may give a configuration more fields or fewer.
        for key in [each for each in known if each in given] if name else dict.fromkeys([*known, *given]):
            yield from _differences(known.get(key), given.get(key), f"{name}.{key}" if name else key)
    elif known != given:
        yield f"{name} was {known!r} and is {given!r} now"

"""Make a folder for the Hub: sharded safetensors, configuration, code, generation settings, tokenizer and card."""

import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from modeling_rebased import ReBasedConfig
from modeling_rebased.training.card import model_card, table

from .lm_eval_results import HARNESS, Evaluation, read_results
from .reading import load_folder, load_generation_config, load_tokenizer
from .report import ConversionError, Report, progress
from .writing import check_destination, write_model, written


# The Hub's identifiers of licenses.
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """.split()  # noqa: SIM905  a list of strings would take a page
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    name: str | None = None,
    datasets: list[str] | None = None,
    languages: list[str] | None = None,
    base_model: str | None = None,
    tags: list[str] | None = None,
    results: list[str | os.PathLike] | None = None,
    card_text: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    push: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Make a folder for the Hub from a model's folder, and upload it if asked to.

    The weights are copied bit for bit, unless `dtype` changes their type.

    Args:
        source: the folder of a model, as `save_pretrained` or a trainer writes it. Its own README.md gives the
            defaults of `license`, `datasets`, `language` and `base_model`.
        destination: the new folder.
        license: the Hub's identifier, such as "apache-2.0". "other" needs `license_name`.
        license_name, license_link: name and address of a license that has no identifier on the Hub.
        name: name of the model in the card. By default that of `push` or `destination`.
        datasets: the Hub's identifiers of what the model was trained on.
        languages: codes of the languages, such as "en".
        base_model: the Hub's identifier of the model that this one was made from.
        tags: tags beside "rebased" and "linear-attention".
        results: files that `lm-eval --output_path` wrote, or folders, of which the newest file of this model is taken.
        card_text: a Markdown file with what no configuration says, such as the training and the limits.
        tokenizer: a folder with a tokenizer, if `source` has none.
        dtype: "float32", "bfloat16" or "float16". By default the weights keep their dtypes.
        max_shard_size: greatest size of one safetensors file.
        push: "user/name" of the repository to upload to, with the account that `hf auth login` knows. The repository
            is created if it does not exist.
        private: whether a new repository can be seen only by its owner.
        overwrite: whether to replace `destination` if it exists.
        dry_run: whether to write and upload nothing.

    Returns:
        A report of the tensors and of what the folder holds.

    Raises:
        ConversionError: an argument or a file is wrong; the message names it. Nothing is left behind. If only the
            upload failed, `destination` is complete.
    """
    check_destination(destination, overwrite, source)
    texts = {
        "--name": name,
        "--base-model": base_model,
        "--license-name": license_name,
        "--license-link": license_link,
    }
    _check_arguments(push, private, dtype, max_shard_size, texts | {"--tag": "" if "" in (tags or []) else None})
    folder = Path(source)
    config, state = load_folder(folder)
    if dtype is not None:
        state = {key: _cast(key, tensor, dtype) for key, tensor in progress(state.items(), "casting")}
    parameters = sum(tensor.numel() for tensor in state.values())
    tokens = load_tokenizer(folder, tokenizer, config)
    settings = load_generation_config(folder, config, tokens)
    evaluation = read_results(results or [], parameters)
    said = _said_by_readme(folder)
    card = hub_card(
        config,
        parameters,
        name=name or (push or Path(os.path.abspath(destination)).name).split("/")[-1],
        **_terms(said, license, license_name, license_link),
        datasets=datasets or said.get("datasets"),
        languages=languages or said.get("language"),
        base_model=base_model or said.get("base_model"),
        tags=tags or [],
        evaluation=evaluation,
        text=_read_text(card_text),
        repository=push,
        prompt=None if tokens is None else "Once upon a time",
    )

    report = Report(str(source), str(destination), dry_run=dry_run)
    for key, tensor in state.items():
        report.map(key, tensor, key)
    report.notes += _notes(evaluation, card, tokens)
    if dry_run:
        if push is not None:
            report.notes.append(f"would be uploaded to {push}")
        return report
    with written(destination, overwrite, source) as path:
        write_model(
            path,
            config,
            state,
            generation_config=settings,
            tokenizer=tokens,
            card=card,
            max_shard_size=max_shard_size,
        )
        report.notes.append("files: " + ", ".join(sorted(each.name for each in path.iterdir())))
    if push is not None:
        report.notes.append(f"uploaded to {upload(destination, push, private)}")
    return report


def upload(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """Upload a folder to the Hub, create the repository if it does not exist, and return its address.

    Raises:
        ConversionError: the Hub refused or could not be reached. The folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=os.fspath(folder), repo_type="model", commit_message="Upload the model"
        )
    except Exception as error:  # the client's errors have no base but this
        raise ConversionError(
            f"{str(folder)!r} is complete, but its upload to {repo_id!r} failed: {type(error).__name__}: {error}"
        ) from error
    return str(url)


def _check_arguments(
    push: str | None, private: bool, dtype: str | None, max_shard_size: str, given: dict[str, str | None]
) -> None:
    for argument, value in given.items():
        if value == "":
            raise ConversionError(f"{argument} is empty; give it a value, or leave it out.")
    if private and push is None:
        raise ConversionError("--private is for the repository of --push, which is not given.")
    if push is not None:
        _check_repository("--push", push)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if not re.fullmatch(r"[1-9][0-9]*([KMG]i?B)", max_shard_size):
        raise ConversionError(f"--max-shard-size is {max_shard_size!r}; it must be a number with KB, MB or GB.")


def _cast(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a tensor in another dtype.

    Raises:
        ConversionError: a finite number becomes infinite, as those above 65,504 do in float16.
    """
    new = tensor.to(DTYPES[dtype])
    if (new.isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max()
        raise ConversionError(f"--dtype is {dtype!r}, which cannot hold {largest:g} in {name!r}.")
    return new


def _check_repository(argument: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"{argument} is {name!r}, which is not a repository's name: {error}") from error


# ---------------------------------------------------------------- what goes into the folder


def _said_by_readme(folder: Path) -> dict[str, Any]:
    """Return the metadata in the README.md of a model's folder."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # yaml's and the card's
        raise ConversionError(f"{str(path)!r} has metadata that cannot be read: {error}") from error


def _terms(
    said: dict[str, Any], license: str | None, license_name: str | None, license_link: str | None
) -> dict[str, str | None]:
    """Return the three fields of the license. What the source's README.md says of another license is left out."""
    if license in (None, said.get("license")):
        license = said.get("license")
        license_name, license_link = license_name or said.get("license_name"), license_link or said.get("license_link")
    if license not in (None, "other") and (license_name or license_link):
        raise ConversionError(f"--license-name and --license-link are for license 'other', but it is {license!r}.")
    return {"license": license, "license_name": license_name, "license_link": license_link}


def _read_text(path: str | os.PathLike | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"--card-text {str(path)!r} cannot be read: {error}") from error


def _notes(evaluation: Evaluation, card: ModelCard, tokens: PreTrainedTokenizerBase | None) -> list[str]:
    """Return what the report says of the results, the tokenizer and the card."""
    notes = [f"left out of the card, no finite number: {each}" for each in evaluation.skipped]
    notes += [f"passed over: --results {each}" for each in evaluation.passed_over]
    if tokens is None:
        notes.append("there is no tokenizer: SOURCE has none and --tokenizer was not given")
    datasets = ", ".join(card.data.datasets or []) or "not stated"
    notes.append(f"model card: license {card.data.license}, {len(evaluation.results)} results, datasets {datasets}")
    return notes


# ---------------------------------------------------------------- the card


def hub_card(
    config: ReBasedConfig,
    parameters: int,
    *,
    name: str,
    license: str | None,
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: list[str] | None = None,
    languages: list[str] | None = None,
    base_model: str | None = None,
    tags: list[str] | None = None,
    evaluation: Evaluation | None = None,
    text: str = "",
    repository: str | None = None,
    prompt: str | None = None,
) -> ModelCard:
    """Return the card of a model for the Hub, its metadata checked.

    Args:
        config, parameters: configuration and number of parameters of the model.
        evaluation: what `read_results` returned.
        text: Markdown to stand after the description.
        repository: "user/name" on the Hub, for the example of its use.
        prompt: text for the example to continue, if there is a tokenizer.
        others: as in `export`.

    Raises:
        ConversionError: the Hub does not know a field of the metadata.
    """
    evaluation = evaluation or Evaluation()
    if license is None:
        raise ConversionError("--license is needed: neither it nor SOURCE's README.md says under which the model is.")
    if license not in LICENSES:
        raise ConversionError(
            f"--license is {license!r}; it must be one of the Hub's identifiers, such as 'apache-2.0', 'mit', "
            "'cc-by-4.0', or 'other' with --license-name."
        )
    if license == "other" and not license_name:
        raise ConversionError("--license is 'other', which needs --license-name.")
    if base_model is not None:
        for each in _as_list(base_model):
            _check_repository("--base-model", each)
    datasets, languages = _as_list(datasets), _as_list(languages)
    for each in datasets:
        if not DATASET.fullmatch(each):
            raise ConversionError(f"--dataset is {each!r}; it must be 'name' or 'user/name' of a dataset on the Hub.")
    for each in languages:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", each):
            raise ConversionError(f"--language is {each!r}; it must be a code such as 'en'.")
    links = ", ".join(f"[{each}](https://huggingface.co/datasets/{each})" for each in datasets)
    results = "None were given."
    if evaluation.rows:
        rows = table(("task", "shots", "metric", "value", "standard error"), evaluation.rows)
        results = f"{rows}\n\nMeasured with [lm-eval]({HARNESS}) {', '.join(sorted(evaluation.versions))}."
    card = model_card(
        config,
        parameters,
        name=name,
        folder=repository or "FOLDER",
        prompt=prompt,
        text=text,
        sections=["## Training data", links or "Not stated.", "## Results", results],
        tags=tags or [],
        license=license,
        license_name=license_name,
        license_link=license_link,
        datasets=datasets or None,
        language=languages or None,
        base_model=base_model,
        metrics=sorted({result.metric_type for result in evaluation.results}) or None,
        model_name=name,
        eval_results=evaluation.results or None,
    )
    check_card(card)
    return card


def check_card(card: ModelCard) -> None:
    """Check a card as far as possible without the Hub: its metadata must read back as it was meant.

    Raises:
        ConversionError: a field does not; the message names it.
    """
    again = ModelCard(str(card))
    if again.data.to_dict() != card.data.to_dict():
        raise ConversionError("The model card's metadata does not read back as it was written.")
    fields = yaml.safe_load(str(card).split("---\n")[1])
    for key, allowed in (("library_name", "transformers"), ("pipeline_tag", "text-generation")):
        if fields.get(key) != allowed:
            raise ConversionError(f"The model card's {key} is {fields.get(key)!r}; it must be {allowed!r}.")


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [str(each) for each in value]

"""Named model configurations, one folder a size. `config_path("150m-rebased")` is a folder for AutoConfig."""

from pathlib import Path


def config_names() -> list[str]:
    """Return the names of the configurations that ship with the package, sorted."""
    return sorted(path.parent.name for path in Path(__file__).resolve().parent.glob("*/config.json"))


def config_path(name: str) -> str:
    """Return the folder of the configuration `name`, ready for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: no configuration has that name; the message lists those there are.
    """
    if name not in config_names():
        raise ValueError(f"configuration {name!r} does not exist; there are {', '.join(config_names())}")
    return str(Path(__file__).resolve().parent / name)

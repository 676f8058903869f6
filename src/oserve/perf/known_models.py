"""Finds the facts of a model by its name, its folder or its configuration."""

from pathlib import Path

from oserve.core import OServeError
from oserve.perf.catalogue import catalogue, nearest
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import read_model


def find_model(name: str) -> ModelFacts:
    """The facts of a folder with a ``config.json``, of such a file, or of a catalogue name.

    Names are case-insensitive; Hugging Face ids of catalogue models work too. Raises OServeError
    for an unknown ``name``.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return read_model(file)
    known = catalogue("models")
    wanted = name.lower()
    for key, row in known.items():
        if wanted in {key, *(alias.lower() for alias in row["aliases"])}:
            facts = {field: value for field, value in row.items() if field != "aliases"}
            return ModelFacts(name=key, **facts)
    raise OServeError(
        f"nothing is known of the model {name!r}",
        place="--model",
        remedy="give a folder with its config.json, or one of: "
        + ", ".join(known)
        + nearest(wanted, known),
    )

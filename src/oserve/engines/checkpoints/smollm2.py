"""SmolLM2-135M-Instruct, the model that ``make serve`` serves: a folder and its int8 copy.

Its weights come in 4 bits (Q4_1) as a GGUF file, inside a Python package (see ``tools/setup.py``).
"""

import sys
from pathlib import Path

from oserve.core import OServeError
from oserve.engines.checkpoints.folder import WEIGHTS, once
from oserve.engines.checkpoints.ggml import GgufModel
from oserve.engines.checkpoints.int8 import make_int8_variant
from oserve.engines.checkpoints.tensors import parameter_count, read_tensors

PARAMETERS = 134_515_008


def make_smollm2(path: Path, gguf: Path) -> Path:
    """Write the folder ``path``, and beside it ``path``-int8, unless they are there.

    Raises ``OServeError`` for a file that holds another model, ``OSError`` where the folders
    cannot be written.
    """

    def write(folder: Path) -> None:
        model = GgufModel(gguf)
        # Before anything is written: what is refused leaves nothing behind.
        count = parameter_count(model.tensors().values())
        if count != PARAMETERS:
            raise OServeError(
                f"it holds {count:,} parameters, not {PARAMETERS:,}",
                place=str(gguf),
                remedy="give the GGUF file of SmolLM2-135M-Instruct",
            )
        model.write(folder)
        read_tensors(folder / WEIGHTS)

    made = once(path, write)
    make_int8_variant(made, made.with_name(made.name + "-int8"))
    return made


def main(arguments: list[str]) -> int:
    """``python -m oserve.engines.checkpoints.smollm2 FOLDER GGUF``."""
    folder, gguf = arguments
    try:
        make_smollm2(Path(folder), Path(gguf))
    except (OServeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

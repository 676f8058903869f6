"""Int8 copies of checkpoints: weights and activations in 8 bits (W8A8), in compressed-tensors form.

Weights of linear layers get one symmetric scale per output channel, activations one per token, at
run time. Embeddings and the LM head keep their precision.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from oserve.engines.checkpoints.folder import CONFIG, WEIGHTS, copy_others, once, write_json
from oserve.engines.checkpoints.tensors import (
    AnyArray,
    CheckpointTensor,
    FloatArray,
    read_tensors,
    write_tensors,
)

_LINEAR = "_proj.weight"


def make_int8_variant(path: Path, out: Path) -> Path:
    """Write an int8 copy of the model folder ``path`` to ``out`` unless it is there.

    Raises ``OServeError`` where the model's weights cannot be read, ``OSError`` where the copy
    cannot be written.
    """

    def write(folder: Path) -> None:
        tensors: dict[str, CheckpointTensor] = {}
        for name, item in read_tensors(path / WEIGHTS).items():
            if not name.endswith(_LINEAR):
                tensors[name] = item
                continue
            tensors[name] = CheckpointTensor(
                kind="I8", shape=item.shape, make=partial(_rounded, item)
            )
            tensors[name.removesuffix("weight") + "weight_scale"] = CheckpointTensor(
                kind="F32", shape=(item.shape[0], 1), make=partial(_scales, item)
            )
        write_tensors(folder / WEIGHTS, tensors)
        copy_others(path, folder)
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        config["quantization_config"] = _quantization_config()
        write_json(folder / CONFIG, config)

    return once(out, write)


def scales(weight: FloatArray) -> FloatArray:
    """The scale of each output channel of a weight (outputs x inputs): its largest value is 127."""
    scale: FloatArray = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1  # all-zero rows must not divide by zero
    return scale


def _scales(item: CheckpointTensor) -> FloatArray:
    return scales(item.make())


def _rounded(item: CheckpointTensor) -> AnyArray:
    weight = item.make()
    return np.clip(np.rint(weight / scales(weight)), -127, 127).astype(np.int8)


def _quantization_config() -> dict[str, object]:
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }

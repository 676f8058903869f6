"""Reads the configuration of a model as the engine does.

``model_type``s that were checked are read with the defaults of their classes, which OServe ships;
others through transformers, where it is installed. What vLLM does not serve is refused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from oserve.core import OServeError
from oserve.core.json_keys import refuse_duplicate_keys
from oserve.perf.config_keys import ConfigKeys
from oserve.perf.context import max_model_len
from oserve.perf.layer_types import layer_count
from oserve.perf.layers import CacheKind, LayerKind, Matrices, Part, summed
from oserve.perf.mixers import Mixer, head_dim_of, heads_of, hidden_of, kv_heads_of, mixers
from oserve.perf.mlps import (
    Mlp,
    experts_of,
    experts_per_token_of,
    is_gated,
    mlps,
    shared_width_of,
)
from oserve.perf.model import ModelFacts
from oserve.perf.modules import Module
from oserve.perf.outside_layers import beside_layers, outside_parameters, tower_parameters
from oserve.perf.quantisation import KEPT_BYTES, Quantisation, quantisation_of
from oserve.perf.serveable import readable, refuse_pooling, refuse_unserved
from oserve.perf.stored import StoredWeights
from oserve.perf.weight_files import weight_file_bytes

_MODELOPT_FILE = "hf_quant_config.json"


def read_model(file: Path) -> ModelFacts:
    """The facts of a ``config.json``; raises OServeError naming the field."""
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise OServeError(
            f"cannot read the model's configuration: {error}",
            place=str(file),
            remedy="give a Hugging Face config.json",
        ) from None
    refuse_duplicate_keys(text, place=str(file))
    if not isinstance(config, dict):
        raise OServeError("it is not an object", place=str(file), remedy="give a config.json")
    refuse_pooling(file.parent, place=str(file))
    beside = _beside(file.parent / _MODELOPT_FILE)
    if beside is not None and "quantization_config" not in config:
        config["quantization_config"] = beside
    name = file.parent.resolve().name
    facts = model_from_config(config, name=name, place=str(file))
    wide = facts.stored is None and "float32" in (config.get("dtype"), config.get("torch_dtype"))
    held = weight_file_bytes(file.parent, facts.layers, wide=wide)
    return replace(facts, file_bytes=held) if held else facts


def _beside(file: Path) -> Mapping[str, Any] | None:
    """ModelOpt's description of the weights, which older checkpoints keep in a file of its own."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "quantization" in found else None


def model_from_config(config: Mapping[str, Any], *, name: str, place: str) -> ModelFacts:
    """Facts from the fields of a Hugging Face configuration; raises OServeError naming a field."""
    refuse_unserved(config, place=place)
    config, read_by = readable(config, place=place)
    keys = ConfigKeys(config, place=place)
    layers = layer_count(keys)
    own, wide = mixers(keys, layers), mlps(keys, layers)
    stored = quantisation_of(config, place=place)
    kinds = _kinds(own, wide, stored) + beside_layers(keys, layers)
    hidden = hidden_of(keys)
    attending = any(kind.attention for kind in kinds)
    heads = heads_of(keys) if attending else 1
    experts = experts_of(keys)
    width = max((mlp.expert_width if experts else mlp.dense_width for mlp in wide), default=0)
    facts = ModelFacts(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads_of(keys) if attending else 1,
        head_dim=head_dim_of(keys) if attending else hidden,
        intermediate=width or hidden,
        vocab=keys.count("vocab_size", "padded_vocab_size"),
        gated=is_gated(keys),
        tied=keys.tied(),
        experts=experts or 1,
        experts_per_token=experts_per_token_of(keys) if experts else 1,
        shared_intermediate=shared_width_of(keys) if experts else 0,
        max_model_len=max_model_len(keys),
        extra_parameters=outside_parameters(keys, layers),
        stored=None if stored is None else _stored(keys, stored, kinds),
        read_by=read_by,
    )
    if len(kinds) == 1 and kinds[0] == facts.plain_kind:
        return facts
    return replace(facts, kinds=kinds)


def _stored(keys: ConfigKeys, stored: Quantisation, kinds: tuple[LayerKind, ...]) -> StoredWeights:
    outside = outside_parameters(keys, layer_count(keys))
    towers = tower_parameters(keys)
    mean = KEPT_BYTES
    if outside:
        mean += towers / outside * (stored.outside_bytes - KEPT_BYTES)
    return StoredWeights(
        block=stored.block,
        divides_experts=stored.divides_experts,
        expert_unit=stored.expert_unit,
        head_bytes=stored.head_bytes,
        outside_bytes=mean,
        matrices=kinds[0].matrices if len(kinds) == 1 else (),
        caveat=stored.caveat,
    )


def _kinds(own: list[Mixer], wide: list[Mlp], stored: Quantisation | None) -> tuple[LayerKind, ...]:
    counts: dict[tuple[Mixer, Mlp, tuple[Matrices, ...]], int] = {}
    plain: dict[tuple[Mixer, Mlp], tuple[Matrices, ...]] = {}
    for layer, pair in enumerate(zip(own, wide, strict=True)):
        if stored is not None:
            found = _matrices(*pair, lambda module, at=layer: stored.bytes_of(at, module))  # type: ignore[misc]
        else:
            found = plain[pair] if pair in plain else _matrices(*pair, lambda _: 0.0)
            plain[pair] = found
        counts[*pair, found] = counts.get((*pair, found), 0) + 1
    return tuple(
        LayerKind(
            count=count,
            cache=mixer.cache,
            mixer=mixer.parameters,
            dense=mlp.dense,
            expert=mlp.expert,
            experts=mlp.experts,
            experts_per_token=mlp.experts_per_token,
            attention=mixer.attention,
            latent_attention=mixer.latent_attention,
            dense_width=mlp.dense_width,
            expert_width=mlp.expert_width,
            matrices=matrices,
        )
        for (mixer, mlp, matrices), count in counts.items()
        if mixer.parameters or mlp.dense or mixer.cache.kind is not CacheKind.NONE
    )


def _matrices(mixer: Mixer, mlp: Mlp, size: Callable[[Module], float]) -> tuple[Matrices, ...]:
    parts = (
        (Part.MIXER, mixer.modules),
        (Part.DENSE, mlp.own),
        (Part.EXPERT, mlp.routed),
        (Part.HELD, (mixer.held,) if mixer.held else ()),
    )
    return summed(
        Matrices(
            part=part,
            parameters=module.parameters,
            shards=module.shards,
            stored_bytes=0.0 if part is Part.HELD else size(module),
        )
        for part, modules in parts
        for module in modules
    )

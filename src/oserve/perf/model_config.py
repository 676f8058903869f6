"""Reads the configuration of a model as the engine does.

``model_type``s that were checked are read with the defaults of their classes, which OServe ships;
others through transformers, where it is installed. What vLLM does not serve is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from oserve.core import OServeError
from oserve.core.json_keys import refuse_duplicate_keys
from oserve.perf.config_keys import ConfigKeys
from oserve.perf.context import max_model_len
from oserve.perf.layer_types import layer_count
from oserve.perf.layers import CacheKind, LayerKind
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
from oserve.perf.outside_layers import beside_layers, outside_parameters
from oserve.perf.serveable import readable, refuse_pooling, refuse_unserved
from oserve.perf.stored import stored_weights


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
    return model_from_config(config, name=file.parent.resolve().name, place=str(file))


def model_from_config(config: Mapping[str, Any], *, name: str, place: str) -> ModelFacts:
    """Facts from the fields of a Hugging Face configuration; raises OServeError naming a field."""
    refuse_unserved(config, place=place)
    config, read_by = readable(config, place=place)
    keys = ConfigKeys(config, place=place)
    layers = layer_count(keys)
    own, wide = mixers(keys, layers), mlps(keys, layers)
    kinds = _kinds(own, wide) + beside_layers(keys, layers)
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
        stored=stored_weights(config, place=place),
        read_by=read_by,
    )
    if len(kinds) == 1 and kinds[0] == facts.plain_kind:
        return facts
    return replace(facts, kinds=kinds)


def _kinds(own: list[Mixer], wide: list[Mlp]) -> tuple[LayerKind, ...]:
    counts: dict[tuple[Mixer, Mlp], int] = {}
    for pair in zip(own, wide, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
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
            dense_width=mlp.dense_width,
            expert_width=mlp.expert_width,
        )
        for (mixer, mlp), count in counts.items()
        if mixer.parameters or mlp.dense or mixer.cache.kind is not CacheKind.NONE
    )

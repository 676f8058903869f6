"""The sizes of a model that determine its memory and work.

They come from a Hugging Face ``config.json`` or the small built-in catalogue. Supported are
decoder-only transformers with multi-head or grouped-query attention, dense or mixture-of-experts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oserve.core import OServeError
from oserve.core.json_keys import refuse_duplicate_keys
from oserve.perf.catalogue import catalogue, nearest

# Other kinds of attention have caches of other sizes; an error is better than a guess.
_UNSUPPORTED = ("kv_lora_rank", "ssm_cfg", "mamba_d_state", "linear_num_key_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Counts, not bytes. ``gated``: the MLP has three matrices instead of two.

    ``intermediate`` is the MLP width, of one expert where there are ``experts``;
    ``experts_per_token`` of them compute each token. ``tied``: the LM head is the embedding.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 1
    experts_per_token: int = 1
    shared_intermediate: int = 0
    max_model_len: int = 4096

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's query, key, value and output projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of a layer (the whole MLP of a dense model)."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def shared_parameters(self) -> int:
        """Parameters of a layer's shared expert, if there is one."""
        return 3 * self.hidden * self.shared_intermediate

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer with all experts, without the norms, which are negligible."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        mlp = self.experts * self.expert_parameters + self.shared_parameters
        return self.attention_parameters + mlp + router

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        idle = (self.experts - self.experts_per_token) * self.expert_parameters
        return self.parameters - self.layers * idle


def find_model(name: str) -> ModelFacts:
    """The facts of a folder with a ``config.json``, of such a file, or of a catalogue name.

    Names are case-insensitive; Hugging Face ids of catalogue models work too. Raises OServeError
    for an unknown ``name``.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return _read_config(file)
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


def _read_config(file: Path) -> ModelFacts:
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
    return model_from_config(config, name=file.parent.resolve().name, place=str(file))


def model_from_config(config: Mapping[str, Any], *, name: str, place: str) -> ModelFacts:
    """Facts from the fields of a Hugging Face configuration; raises OServeError naming a field."""
    # Multimodal models nest the language model's fields one level down.
    config = config.get("text_config", config)
    odd = next((field for field in _UNSUPPORTED if config.get(field)), None)
    if odd is not None:
        raise OServeError(
            f"its attention is of a kind that is not modelled (it has {odd})",
            place=f"{place}:{odd}",
            remedy="profile the model instead: oserve profile",
        )
    hidden = _count(config, place, "hidden_size", "n_embd", "d_model")
    heads = _count(config, place, "num_attention_heads", "n_head")
    opt = config.get("model_type") == "opt"
    experts = _optional(config, place, "num_local_experts", "num_experts", "n_routed_experts") or 1
    wide = ("moe_intermediate_size",) if experts > 1 and "moe_intermediate_size" in config else ()
    plain = ("ffn_dim",) if opt else ("intermediate_size", "n_inner", "ffn_dim")
    return ModelFacts(
        name=name,
        layers=_count(config, place, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=_optional(config, place, "num_key_value_heads") or heads,
        head_dim=_optional(config, place, "head_dim") or hidden // heads,
        intermediate=_count(config, place, *wide, *plain),
        vocab=_count(config, place, "vocab_size"),
        gated=config.get("model_type") not in {"opt", "gpt2", "gpt_neox", "falcon", "bloom"},
        tied=bool(config.get("tie_word_embeddings", opt)),
        experts=experts,
        experts_per_token=_optional(config, place, "num_experts_per_tok") or min(2, experts),
        shared_intermediate=_optional(config, place, "shared_expert_intermediate_size") or 0,
        max_model_len=_optional(config, place, "max_position_embeddings", "n_positions") or 4096,
    )


def _count(config: Mapping[str, Any], place: str, *names: str) -> int:
    value = _optional(config, place, *names)
    if value is None:
        raise OServeError(
            f"the field {names[0]} is missing", place=place, remedy="give a complete config.json"
        )
    return value


def _optional(config: Mapping[str, Any], place: str, *names: str) -> int | None:
    for field in names:
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OServeError(
                f"{field} is {value!r}, not a count of at least 1",
                place=f"{place}:{field}",
                remedy="correct it",
            )
        return value
    return None

"""Constants of the cost of switches, from a file as ``benchmarks/switch/fit.py`` writes it."""

from pathlib import Path
from typing import Annotated

import msgspec

from oserve.config.reading import convert, read_document
from oserve.switch.costs import SwitchCosts

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
_DEFAULTS = SwitchCosts()


class _CostsFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    engine_start_s: _Seconds = _DEFAULTS.engine_start_s
    further_start_s: _Seconds = _DEFAULTS.further_start_s
    join_s: _Seconds = _DEFAULTS.join_s
    link_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = _DEFAULTS.link_share
    quantise_s_per_byte: Annotated[float, msgspec.Meta(ge=0, le=1)] = _DEFAULTS.quantise_s_per_byte
    verify_s: _Seconds = _DEFAULTS.verify_s
    check_s_per_byte: Annotated[float, msgspec.Meta(ge=0, le=1)] = _DEFAULTS.check_s_per_byte
    commit_s: _Seconds = _DEFAULTS.commit_s
    drain_s: _Seconds = _DEFAULTS.drain_s
    room_s: _Seconds = _DEFAULTS.room_s


def load_switch_costs(path: str) -> SwitchCosts:
    """Costs from YAML or JSON, with defaults for missing fields; raises OServeError if invalid."""
    return SwitchCosts(
        **msgspec.structs.asdict(convert(read_document(Path(path)), _CostsFile, place=path))
    )

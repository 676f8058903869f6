"""Constants of what switches cost, from a file such as ``benchmarks/switch/fit.py`` writes."""

from pathlib import Path
from typing import Annotated

import msgspec

from oserve.config.reading import convert, read_document
from oserve.switch.costs import SwitchCosts

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
_USUAL = SwitchCosts()


class _CostsFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    engine_start_s: _Seconds = _USUAL.engine_start_s
    further_start_s: _Seconds = _USUAL.further_start_s
    join_s: _Seconds = _USUAL.join_s
    link_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = _USUAL.link_share
    quantise_s_per_byte: Annotated[float, msgspec.Meta(ge=0, le=1)] = _USUAL.quantise_s_per_byte
    verify_s: _Seconds = _USUAL.verify_s
    check_s_per_byte: Annotated[float, msgspec.Meta(ge=0, le=1)] = _USUAL.check_s_per_byte
    commit_s: _Seconds = _USUAL.commit_s
    drain_s: _Seconds = _USUAL.drain_s
    room_s: _Seconds = _USUAL.room_s


def load_switch_costs(path: str) -> SwitchCosts:
    """From YAML or JSON; fields that are not given are the usual. Raises OServeError."""
    return SwitchCosts(
        **msgspec.structs.asdict(convert(read_document(Path(path)), _CostsFile, place=path))
    )

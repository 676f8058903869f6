"""What nodes have of a model, compared: who has it, who lacks it, who has another. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from oserve.nodes.fetch_messages import ModelHoldings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpread:
    """Where a model is. ``model``: its files, as most of the nodes that have it have them.

    ``holders`` have these files, ``seekers`` some of them or none; ``strangers`` have others, which
    are left alone: an engine can start from them. ``misfits`` have others, and not all: they are
    left alone, too, and no engine can start there.
    """

    model: ModelHoldings
    holders: frozenset[str] = frozenset()
    seekers: frozenset[str] = frozenset()
    strangers: frozenset[str] = frozenset()
    misfits: frozenset[str] = frozenset()


def spread_of(found: Mapping[str, ModelHoldings]) -> ModelSpread:
    """Compare nodes, by name. Without one that has the whole model there are no seekers."""
    whole = {name: item for name, item in found.items() if item.complete}
    if not whole:
        return ModelSpread(model=ModelHoldings())
    counts = Counter(item.files for item in whole.values())
    model = max(
        whole.values(),
        key=lambda item: (
            counts[item.files],
            item.size_bytes,
            [(file.name, file.digest) for file in item.files],
            item.revision,
        ),
    )
    wanted = {file.name: file for file in model.files}
    holders, seekers, strangers, misfits = set(), set(), set(), set()
    for name, item in found.items():
        own = {file.name: file for file in item.files}
        shared = own.keys() & wanted.keys()
        alike = all(own[file] == wanted[file] for file in shared)
        if alike and own.keys() >= wanted.keys():
            holders.add(name)
        elif item.complete:
            # It can serve with what it has, be it fewer files.
            strangers.add(name)
        elif alike:
            seekers.add(name)
        else:
            misfits.add(name)
    return ModelSpread(
        model=model,
        holders=frozenset(holders),
        seekers=frozenset(seekers),
        strangers=frozenset(strangers),
        misfits=frozenset(misfits),
    )

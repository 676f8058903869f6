"""What a server sees of its cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from oserve.core import Observation


@dataclass(slots=True)
class ClusterView:
    """The last observation of the cluster, and the replicas given up, with the reason."""

    observation: Observation | None = None
    lost: Mapping[str, str] = field(default_factory=dict)

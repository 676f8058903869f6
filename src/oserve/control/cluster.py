"""The cluster API: what the control loop uses of a cluster, live or simulated."""

from typing import Protocol

from oserve.core import Action, Observation


class Cluster(Protocol):
    """``apply`` requests an action and returns; its outcome shows in a later ``observe``."""

    async def observe(self) -> Observation: ...

    async def apply(self, action: Action) -> None: ...

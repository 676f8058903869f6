"""The door: all that the control loop may ask of a cluster, live or simulated."""

from typing import Protocol

from oserve.core import Action, Observation


class Cluster(Protocol):
    """``apply`` only asks; the outcome shows in a later ``observe``."""

    async def observe(self) -> Observation: ...

    async def apply(self, action: Action) -> None: ...

"""The keeper of a server's own machine."""

from oserve.engines.holding import HeldEngines, KeeperPlace, LocalDial
from oserve.startup.deployment import ServerDeployment
from oserve.startup.folders import ServerFolders


def engine_keeper(deployment: ServerDeployment, folders: ServerFolders) -> HeldEngines:
    """The keeper that holds engines and gateway processes."""
    engines = deployment.settings.engines
    on_cpu = all(device.kind == "cpu" for device in deployment.devices)
    place = KeeperPlace(
        folder=folders.run,
        state_dir=folders.state,
        log_dir=folders.log,
        method=engines.method(on_cpu=on_cpu),
        grace_s=engines.orphan_grace_s,
    )
    return HeldEngines(LocalDial(place), grace_s=engines.orphan_grace_s)

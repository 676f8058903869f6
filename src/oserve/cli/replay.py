"""``oserve replay``: the controller's decisions on the recorded observations of a server."""

import json
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from oserve.cli.options import OverrideOption
from oserve.config import Settings, load_settings, parse_override
from oserve.control.decision import Mode
from oserve.startup.replay import replayed_decisions, saved_context


def replay(
    file: Annotated[str, typer.Argument(help="state.sqlite of a server's state directory.")],
    mode: Annotated[Mode, typer.Option(help="advise: the plan stays what it was.")] = Mode.AUTO,
    override: OverrideOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Feed recorded observations to the controller and print its decisions with their numbers."""
    context = saved_context(Path(file))
    overrides = dict(parse_override(item) for item in override or [])
    settings: Settings = load_settings(None, overrides, {}, base=context.settings)
    for decision in replayed_decisions(Path(file), settings, context, mode=mode):
        if as_json:
            print(json.dumps(msgspec.to_builtins(decision)))
        else:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision.at_s))
            print(f"{at} {decision.line}")

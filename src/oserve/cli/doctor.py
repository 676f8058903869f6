"""``oserve doctor``: examine this machine, or every node of a cluster."""

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oserve.cli.options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    OverrideOption,
    argument_or_option,
)
from oserve.cli.serve import settings_from
from oserve.core import OServeError
from oserve.nodes.checks import NodeFinding, NodeVerdict, exit_code, judge, worst
from oserve.nodes.directory import NodeDirectory
from oserve.nodes.doctor import MOST_PAIRS, examine_here, examine_nodes
from oserve.nodes.examination import NodeExamination
from oserve.startup.lock import serves_already
from oserve.startup.node_fleet import node_directory

_COLOURS = {NodeVerdict.OK: "green", NodeVerdict.WARN: "yellow", NodeVerdict.FAIL: "red"}


def doctor(
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Examine these nodes: ray, ray:HOST:PORT, or a file with hosts."),
    ] = None,
    state_dir: Annotated[
        str | None, typer.Option(help="State folder of the server that uses the nodes of Ray.")
    ] = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
    most_pairs: Annotated[
        int, typer.Option("--pairs", min=1, max=4096, help="Measure at most so many pairs.")
    ] = MOST_PAIRS,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 for warnings.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Examine this machine, or every node of a cluster, and say what to change.

    Prints no address, token or user name. Exit code 2 if something fails.
    """
    options = {
        "model": argument_or_option(model_argument, model, name="--model"),
        "cluster.nodes": cluster,
        "state_dir": state_dir,
    }
    settings = settings_from(config, options, override)
    wanted = settings.model or ""
    with _quiet():
        directory = node_directory(settings)
        if directory is None:
            found = examine_here(wanted)
        else:
            ours = not serves_already(Path(settings.state_dir))
            found = asyncio.run(_examined(directory, wanted, most_pairs, ours=ours))
    findings = judge(found)
    if as_json:
        verdict = worst(findings)
        print(json.dumps({"verdict": verdict, "findings": [asdict(item) for item in findings]}))
    else:
        show(findings, Console(highlight=False))
    raise typer.Exit(exit_code(findings, strict=strict))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of the nodes, which names addresses; findings say what is wrong."""
    log = logging.getLogger("oserve")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


async def _examined(
    directory: NodeDirectory, model: str, most_pairs: int, *, ours: bool
) -> list[NodeExamination]:
    try:
        try:
            await directory.start()
        except OServeError:
            # What is known of each node is told in its findings.
            if not directory.nodes:
                raise
        found = list(await examine_nodes(directory.nodes, model, most_pairs=most_pairs))
    except BaseException:  # an interrupt, too, must not leave the helper running
        await directory.close(end_nodes=False)
        raise
    # Nodes that were set up only for this are given back.
    unused = all(not node.engines and not node.unreached for node in found)
    await directory.close(end_nodes=ours and unused)
    return found


def show(findings: list[NodeFinding], console: Console) -> None:
    """Print the findings as a table, and the verdict."""
    table = Table("node", "check", "", "found", "to change")
    before = ""
    for item in findings:
        verdict = f"[{_COLOURS[item.verdict]}]{item.verdict}[/]"
        texts = (item.node if item.node != before else "", item.check)
        table.add_row(
            *(escape(text) for text in texts), verdict, escape(item.found), escape(item.remedy)
        )
        before = item.node
    console.print(table)
    counts = Counter(item.verdict for item in findings)
    words = f"{counts[NodeVerdict.FAIL]} failures, {counts[NodeVerdict.WARN]} warnings"
    console.print(f"[{_COLOURS[worst(findings)]}]{worst(findings)}[/]: {words}")

"""Cli: the command line. It parses, calls and prints; all else is in the packages below."""

import sys

import typer
from rich.console import Console

from oserve import __version__
from oserve.cli import forecast as forecasting
from oserve.cli import keys as keys_of_clients
from oserve.cli import node as nodes
from oserve.cli.bench import bench
from oserve.cli.doctor import doctor
from oserve.cli.engines import engines
from oserve.cli.look import look
from oserve.cli.plan import plan
from oserve.cli.profile import profile
from oserve.cli.replay import replay
from oserve.cli.serve import serve
from oserve.cli.simulate import simulate
from oserve.cli.status import status
from oserve.cli.switch import switch
from oserve.cli.tune import tune
from oserve.cli.validate import validate
from oserve.core import OServeError

app = typer.Typer(
    name="oserve",
    help="Serve one large language model on heterogeneous replicas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(plan)
app.command()(profile)
app.add_typer(forecasting.app, name="forecast")
app.command()(simulate)
app.command()(tune)
app.command()(bench)
app.command()(status)
app.command()(switch)
app.add_typer(nodes.app, name="node")
app.add_typer(keys_of_clients.app, name="keys")
app.command()(replay)
app.command()(look)
app.command()(validate)
app.command()(engines)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    del version


def main() -> None:
    """Entry point: an OServeError prints as two lines and exits with code 2."""
    try:
        app()
    except OServeError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]error[/] {error.place}: ", end="")
        console.print(error.message, markup=False)
        console.print("[bold]remedy[/] ", end="")
        console.print(error.remedy, markup=False)
        sys.exit(2)

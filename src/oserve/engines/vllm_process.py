"""The first process of an engine: vLLM's API server, or its workers on one more node.

Runs as ``python -m oserve.engines.vllm_process``, or in a fork of the zygote. vLLM's module of the
API server ignores ``--headless``, and its command line is not part of every build.
"""

# vLLM takes long to import, and must not be before the process is set up for it.
# ruff: noqa: PLC0415

import os
import runpy
import sys

from oserve.engines.arguments import interface_variables


def main() -> None:
    """Run vLLM to its end, with the arguments of this process."""
    if "--nnodes" in sys.argv and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ.update(interface_variables(_interface(os.environ["VLLM_HOST_IP"])))
    if "--headless" in sys.argv:
        _run_workers()
        return
    try:
        from vllm.entrypoints.launchers.api_server.entry import main as serve
    except ModuleNotFoundError:
        # Where it was before vLLM 0.32.
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
        return
    serve()


def _interface(address: str) -> str:
    """The name of this machine's interface with that address."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    sys.exit(
        f"no interface of this machine has the address {address}, by which other nodes are to "
        "reach it: address nodes by addresses of their own"
    )


def _run_workers() -> None:
    """Run the workers of a part that is not the first; see ``core.parts``."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(description="Workers of a vLLM engine."))
    arguments = parser.parse_args()
    # What the command line would set.
    arguments.api_server_count = 0
    validate_parsed_serve_args(arguments)
    run_headless(arguments)


if __name__ == "__main__":
    main()

"""Runs one command as the leader of a process group, and lets no process of it survive.

Runs as ``python -m oserve.engines.supervisor --parent PID --log PATH -- command``. It prints
``SupervisorReady``, and ends the whole group when its own parent dies (even by KILL), on TERM, or
when the command ends; it exits with the command's status.
"""

import argparse
import contextlib
import os
import signal
import sys
from types import FrameType

from oserve.engines.group import (
    adopt_orphans,
    die_with_parent,
    end_group,
    fork_group,
    release_leftovers,
    remove_if_unused,
)
from oserve.engines.process_messages import SupervisorReady, encoded

_GRACE_S = 2.0
_BLOCKED = {signal.SIGTERM, signal.SIGINT}


def main() -> int:
    """Entry point; returns the command's exit status (128 + n for signal n)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--log", required=True, help="file for the command's output")
    parser.add_argument("--cores", default="", help="CPU cores it may use, with commas between")
    parser.add_argument("--folder", default="", help="its temporary folder, removed at the end")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    # Ctrl-C in the terminal is for the process that started this one.
    os.setpgid(0, 0)
    # Until the handlers below know the child, a signal would leave it behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    adopt_orphans()
    pid = _start(arguments)

    def stop(number: int, frame: FrameType | None) -> None:
        end_group(pid, grace_s=_GRACE_S)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with_parent(signal.SIGTERM, parent=arguments.parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(encoded(SupervisorReady(pid=pid)))
        sys.stdout.flush()
    status = 1
    with contextlib.suppress(ChildProcessError):
        _, raw = os.waitpid(pid, 0)
        status = os.waitstatus_to_exitcode(raw)
    end_group(pid, grace_s=0)
    release_leftovers(pid, arguments.folder)
    if arguments.folder and os.getppid() != arguments.parent:
        # The parent has ended and cannot remove the folder that holds it.
        remove_if_unused(os.path.dirname(arguments.folder))
    return status if status >= 0 else 128 - status


def _start(arguments: argparse.Namespace) -> int:
    supervisor = os.getpid()
    pid = fork_group()
    if pid:
        return pid
    die_with_parent(parent=supervisor)
    if arguments.cores:
        os.sched_setaffinity(0, [int(core) for core in arguments.cores.split(",")])
    log = os.open(arguments.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    try:
        os.execvp(arguments.command[0], arguments.command)
    except OSError as error:
        os.write(2, f"{arguments.command[0]}: {error}\n".encode())
        os._exit(127)


if __name__ == "__main__":
    sys.exit(main())

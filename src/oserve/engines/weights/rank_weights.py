"""Carries the server's commands out on one rank."""

import os
from collections.abc import Sequence

from oserve.engines.rank_commands import (
    AbortJob,
    CommandDone,
    CommandRefused,
    DescribeLayout,
    JobReport,
    LayoutReply,
    ListenerReply,
    MoveShards,
    OpenListener,
    ParameterLayout,
    RankCommand,
    RankReply,
    ReportJob,
    SumShards,
    TakeUpWeights,
    encoded,
    own_command,
)
from oserve.engines.weights.cuda import transfer_for
from oserve.engines.weights.jobs import Checksums, Job
from oserve.engines.weights.model_types import ModelRunner, WorkerConfig
from oserve.engines.weights.raw import RawWeights, raw_weights
from oserve.engines.weights.sockets import Listener, TransferError
from oserve.engines.weights.transfer import Transfer


class RankWeights:
    """The weights of rank ``rank`` of an engine, and the job that works on them.

    ``runner`` holds the model, ``folder`` the sockets; ``config`` is the worker's.
    """

    def __init__(
        self, rank: int, runner: ModelRunner, config: WorkerConfig, folder: str | None = None
    ) -> None:
        self._rank = rank
        self._runner = runner
        self._config = config
        self._folder = folder or os.environ["TMPDIR"]
        self._listener: Listener | None = None
        self._transfer: Transfer | None = None
        self._job: Job | None = None

    def handle(self, commands: Sequence[str]) -> str:
        """Do this rank's command and reply; both encoded, see ``rank_commands``."""
        try:
            return encoded(self._reply(own_command(commands, self._rank)))
        except (ValueError, TransferError, RuntimeError, OSError) as error:
            # msgspec's errors are ValueError; torch's and those of missing weights RuntimeError.
            reason = str(error) or type(error).__name__
            return encoded(CommandRefused(reason=f"rank {self._rank}: {reason}"))

    def _reply(self, command: RankCommand) -> RankReply:
        match command:
            case DescribeLayout():
                return self._layout()
            case OpenListener():
                return self._open()
            case MoveShards():
                raw = self._raw()
                self._transfer = transfer_for(command, raw.tensors, self._listener, raw.memory)
                self._start(self._transfer)
            case SumShards():
                received = self._transfer is not None and command.as_received
                staged = self._transfer.staged_sums if received and self._transfer else {}
                self._start(Checksums(command.name, self._raw().tensors, command.parts, staged))
            case ReportJob():
                return JobReport(state="none") if self._job is None else self._job.report()
            case TakeUpWeights():
                self._raw().repack(self._config)
            case AbortJob():
                self._abort()
        return CommandDone()

    def _layout(self) -> LayoutReply:
        return LayoutReply(
            parameters={
                name: ParameterLayout(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                for name, tensor in self._raw().tensors.items()
            }
        )

    def _open(self) -> ListenerReply:
        self._abort()
        path = os.path.join(self._folder, f"w{self._rank}.sock")
        self._listener = Listener(path)
        return ListenerReply(address=path)

    def _start(self, job: Job) -> None:
        self._job = job
        job.start()

    def _abort(self) -> None:
        if self._job is not None:
            self._job.abort()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _raw(self) -> RawWeights:
        return raw_weights(self._runner.get_model())

"""Loaded by every vLLM worker (``--worker-extension-cls``): weights that move, and patches.

vLLM's control route calls ``oserve_command`` on all workers of an engine at once, with the commands
of ``rank_commands``. The call returns at once, except for ``TakeUpWeights``: long work runs in a
background thread, which the server polls.

Loading this module applies the patches of workers (``oserve.engines.patches``).
"""

import os
from collections.abc import Sequence

import msgspec

from oserve.engines.patches import apply
from oserve.engines.rank_commands import (
    COMMANDS,
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
)
from oserve.engines.weights.cuda import CudaTransfer
from oserve.engines.weights.jobs import Job
from oserve.engines.weights.model_types import ModelRunner, VllmConfig
from oserve.engines.weights.raw import RawWeights, raw_weights
from oserve.engines.weights.sockets import Listener, TransferError
from oserve.engines.weights.sums import Checksums
from oserve.engines.weights.transfer import Transfer


class RankWeights:
    """The weights of rank ``rank`` of an engine, and the job that works on them.

    ``runner`` holds the model; ``config`` is the worker's.
    """

    def __init__(self, rank: int, runner: ModelRunner, config: VllmConfig) -> None:
        self._rank = rank
        self._runner = runner
        self._config = config
        self._listener: Listener | None = None
        self._transfer: Transfer | None = None
        self._job: Job | None = None

    def handle(self, commands: Sequence[str]) -> RankReply:
        """Carry out this rank's command, of one for each rank or one for all."""
        try:
            if len(commands) != 1 and self._rank >= len(commands):
                raise ValueError(f"{len(commands)} commands came, none for this rank")
            own = commands[0] if len(commands) == 1 else commands[self._rank]
            return self._reply(COMMANDS.decode(own))
        except (ValueError, TransferError, RuntimeError, OSError) as error:
            # msgspec raises ValueError; torch, and ``raw_weights``, RuntimeError.
            reason = str(error) or type(error).__name__
            return CommandRefused(reason=f"rank {self._rank}: {reason}")

    def _reply(self, command: RankCommand) -> RankReply:
        match command:
            case DescribeLayout():
                return self._layout()
            case OpenListener():
                return self._open()
            case MoveShards():
                self._move(command)
            case SumShards():
                transfer = self._transfer if command.as_received else None
                staged = {} if transfer is None else transfer.staged_sums
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
                name: ParameterLayout(tuple(one.shape), str(one.dtype).removeprefix("torch."))
                for name, one in self._raw().tensors.items()
            }
        )

    def _open(self) -> ListenerReply:
        self._abort()
        path = os.path.join(os.environ["TMPDIR"], f"w{self._rank}.sock")
        self._listener = Listener(path)
        return ListenerReply(address=path)

    def _move(self, command: MoveShards) -> None:
        if self._listener is None:
            raise TransferError("no listener was opened before the transfer")
        raw = self._raw()
        if any(tensor.is_cuda for tensor in raw.tensors.values()):
            self._transfer = CudaTransfer(command, raw.tensors, self._listener)
        else:
            self._transfer = Transfer(command, raw.tensors, self._listener, raw.memory)
        self._start(self._transfer)

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


class WorkerExtension:
    """vLLM mixes it into its worker class, whose members these are."""

    rank: int
    model_runner: ModelRunner
    vllm_config: VllmConfig

    _oserve_weights: RankWeights | None = None

    def oserve_command(self, commands: list[str]) -> str:
        """Carry out a command of the server and reply, both as JSON (``rank_commands``)."""
        if self._oserve_weights is None:
            self._oserve_weights = RankWeights(self.rank, self.model_runner, self.vllm_config)
        return msgspec.json.encode(self._oserve_weights.handle(commands)).decode()


apply("worker")

"""Loaded by every vLLM worker (``--worker-extension-cls``): weights that move, and patches.

vLLM's control route calls ``oserve_command`` on all workers of an engine at once, with the commands
of ``rank_commands``. The call returns at once, except for ``TakeUpWeights``: long work runs in a
background thread, which the server polls.

Loading this module applies the patches of workers (``oserve.engines.patches``).
"""

from typing import Protocol

from oserve.engines.patches import apply
from oserve.engines.weights.model_types import ModelRunner, WorkerConfig


class CommandHandler(Protocol):
    """See ``weights.rank_weights.RankWeights``."""

    def handle(self, commands: list[str]) -> str: ...


class WorkerExtension:
    """vLLM mixes it into its worker class, whose members these are."""

    rank: int
    model_runner: ModelRunner
    vllm_config: WorkerConfig

    _oserve_handler: CommandHandler | None = None

    def oserve_command(self, commands: list[str]) -> str:
        """Carry out this rank's command, of one for each rank or one for all; returns the reply."""
        if self._oserve_handler is None:
            # It loads the parts of torch that the platform has, which vLLM has chosen by now.
            from oserve.engines.weights.rank_weights import RankWeights  # noqa: PLC0415

            self._oserve_handler = RankWeights(self.rank, self.model_runner, self.vllm_config)
        return self._oserve_handler.handle(commands)


apply("worker")

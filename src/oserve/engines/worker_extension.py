"""Loaded by every vLLM worker (``--worker-extension-cls``): weights that move, and patches.

The methods are called by name over an engine's control route (``oserve.engines.control``), each on
all workers of an engine at once; a list of arguments holds one for each. They return at once, but
``oserve_weights_take_up``: what takes long is done in a thread and asked after.

Loading it applies the patches of workers (``oserve.engines.patches``).
"""

# What exists depends on the platform, which vLLM alone knows.
# ruff: noqa: PLC0415

import os
from typing import Any

from oserve.engines.patches import apply


class WorkerExtension:
    """Mixed into the worker class by vLLM."""

    _oserve_listener: Any = None
    _oserve_transfer: Any = None
    _oserve_job: Any = None

    def oserve_weights_layout(self) -> dict[str, Any]:
        """Shape and type of each parameter, as loaded."""
        return {
            name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for name, tensor in self._oserve_raw().tensors.items()
        }

    def oserve_weights_open(self) -> dict[str, str]:
        """Be ready to be called by others; tells where."""
        from oserve.engines.weights.sockets import Listener

        self.oserve_weights_abort()
        path = os.path.join(os.environ["TMPDIR"], f"w{self.rank}.sock")  # type: ignore[attr-defined]
        self._oserve_listener = Listener(path)
        return {"address": path}

    def oserve_weights_move(self, orders: list[dict[str, Any]]) -> None:
        """Start a transfer; see ``weights.transfer.Order``."""
        from oserve.engines.weights.cuda import transfer_for
        from oserve.engines.weights.transfer import Order

        order = Order(**orders[self.rank])  # type: ignore[attr-defined]
        raw = self._oserve_raw()
        self._oserve_job = self._oserve_transfer = transfer_for(
            order, raw.tensors, self._oserve_listener, raw.memory
        )
        self._oserve_job.start()

    def oserve_weights_sums(
        self, name: str, parts: list[list[Any]], as_received: bool = False
    ) -> None:
        """Start computing checksums of parts of parameters.

        ``as_received``: of what was converted on arrival, as it was before.
        """
        from oserve.engines.weights.transfer import Checksums

        transfer = self._oserve_transfer
        staged = transfer.staged_sums if as_received and transfer is not None else {}
        self._oserve_job = Checksums(
            name,
            self._oserve_raw().tensors,
            parts[self.rank],  # type: ignore[attr-defined]
            staged,
        )
        self._oserve_job.start()

    def oserve_weights_status(self) -> dict[str, Any]:
        """How what was started last stands."""
        return {"state": "none"} if self._oserve_job is None else self._oserve_job.document()

    def oserve_weights_take_up(self) -> None:
        """Compute with what has come. Blocks the engine."""
        self._oserve_raw().repack(self.vllm_config)  # type: ignore[attr-defined]

    def oserve_weights_abort(self) -> None:
        """End whatever goes on."""
        if self._oserve_job is not None:
            self._oserve_job.abort()
        if self._oserve_listener is not None:
            self._oserve_listener.close()
            self._oserve_listener = None

    def _oserve_raw(self) -> Any:
        from oserve.engines.weights.raw import raw_weights

        return raw_weights(self.model_runner.get_model())  # type: ignore[attr-defined]


apply("worker")

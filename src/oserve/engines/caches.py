"""Inside vLLM's engines: moves the KV caches of requests that continue on another engine.

A KV connector (``--kv-transfer-config``) runs in the scheduler's process and in each worker's. If a
request ends whose cache was asked for, it keeps its blocks until every worker has written its share
of them to a folder. A request that starts with such a cache waits until the workers have read its
parts, in a thread, while other requests go on. Each worker writes and reads its own layers and KV
heads, so the two engines may differ in tensor and pipeline size. Blocks are copied whole: model,
type and block size (``form``) must be the same. Any other cache is computed again.

Caches have the layout of vLLM's CPU attention: (blocks, KV heads, tokens of a block, key and
value). ``wire.caches`` describes the folder.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from oserve.engines.arguments import CACHES
from oserve.engines.cache_types import (
    CacheParallelConfig,
    ConnectorConfig,
    RequestBlocks,
    ScheduledRequest,
    StepPlan,
    StepResult,
    TensorSlice,
)
from oserve.wire.caches import CacheFolder, Note, own_name, taken_name

# The other engine ends a request only after its present step, which may be long.
_WAIT_S = 10.0
# An idle engine would poll without pause, on cores that other engines need.
_PAUSE_S = 0.003
_FORGOTTEN_S = 120.0


@dataclass(frozen=True)
class CacheCopy:
    """Blocks of a request to copy; ``first`` is the place of the first one in its cache."""

    request: str
    name: str
    blocks: list[int]
    first: int = 0
    parts: int = 0


@dataclass
class CacheCommands(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers: caches to write, and caches to read."""

    writes: list[CacheCopy] = field(default_factory=list)
    reads: list[CacheCopy] = field(default_factory=list)


class Connector(KVConnectorBase_V1):  # type: ignore[misc]
    """The scheduler's side and the worker's, in one class as vLLM requires."""

    def __init__(
        self, vllm_config: ConnectorConfig, role: KVConnectorRole, kv_cache_config: object = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._folder = CacheFolder(os.environ[CACHES])
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._parts = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._all_heads = int(model.get_total_num_kv_heads())
        self._form = " ".join(
            str(part)
            for part in (
                model.dtype,
                model.quantization,
                vllm_config.cache_config.cache_dtype,
                self._all_heads,
                model.get_head_size(),
                self._block_tokens,
            )
        )
        if role == KVConnectorRole.WORKER:
            self._worker = _Worker(self._folder, parallel, self._all_heads)
        # Of the scheduler: commands for the next step; by request, since when it waits, the cache
        # that it can read, and the cache that it reads; requests whose caches are being written.
        self._commands = CacheCommands()
        self._since_s: dict[str, float] = {}
        self._ready: dict[str, tuple[str, Note, int]] = {}
        self._reading: dict[str, str] = {}
        self._writing: set[str] = set()
        # Requests that compute their whole prompt, although they named a cache.
        self._computing: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a lost cache is computed again."""
        return False

    # -- the scheduler: requests that start -----------------------------------------------------
    def get_num_new_matched_tokens(
        self, request: ScheduledRequest, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """The number of tokens to read from a cache; ``None`` while that is not known."""
        name = taken_name(request.kv_transfer_params)
        if not name or request.request_id in self._computing:
            return 0, False
        note = self._folder.note(name)
        since_s = self._since_s.setdefault(request.request_id, time.monotonic())
        if note is None and time.monotonic() - since_s < _WAIT_S:
            return None, False
        del self._since_s[request.request_id]
        fits = note is not None and note.form == self._form
        # The engine computes at least one token, to continue from.
        tokens = min(note.tokens, request.num_tokens - 1) if note is not None and fits else 0
        if note is None or tokens <= num_computed_tokens:
            # Without free blocks, vLLM calls this again later.
            self._computing.add(request.request_id)
            self._folder.remove(name)
            return 0, False
        self._ready[request.request_id] = name, note, num_computed_tokens
        return tokens - num_computed_tokens, True

    def update_state_after_alloc(
        self, request: ScheduledRequest, blocks: RequestBlocks, num_external_tokens: int
    ) -> None:
        """Blocks for the cache are allocated: have the workers read it."""
        found = self._ready.pop(request.request_id, None)
        if found is None or num_external_tokens == 0:
            return
        name, note, computed = found
        first = computed // self._block_tokens
        last = -(-(computed + num_external_tokens) // self._block_tokens)
        numbers = blocks.get_block_ids()[0][first:last]
        self._commands.reads.append(
            CacheCopy(request.request_id, name, list(numbers), first=first, parts=note.parts)
        )
        self._reading[request.request_id] = name

    # -- the scheduler: requests that end -------------------------------------------------------
    def request_finished(
        self, request: ScheduledRequest, block_ids: list[int]
    ) -> tuple[bool, dict[str, object] | None]:
        """A request ends; True keeps its blocks until the workers have written its cache."""
        self._since_s.pop(request.request_id, None)
        self._ready.pop(request.request_id, None)
        self._computing.discard(request.request_id)
        name = own_name(request.kv_transfer_params)
        if not name or not self._folder.asked(name):
            return False, None
        self._folder.sweep(_FORGOTTEN_S)
        tokens = request.num_computed_tokens - getattr(request, "num_in_flight_tokens", 0)
        count = -(-tokens // self._block_tokens)
        if tokens <= 0 or len(block_ids) < count:
            self._folder.put_note(name, Note())
            return False, None
        self._folder.put_note(name, Note(tokens=tokens, parts=self._parts, form=self._form))
        self._commands.writes.append(CacheCopy(request.request_id, name, block_ids[:count]))
        self._writing.add(request.request_id)
        return True, None

    def has_pending_push_work(self) -> bool:
        """Whether vLLM must run steps although no request runs."""
        return bool(self._writing)

    def build_connector_meta(self, scheduler_output: StepPlan) -> CacheCommands:
        """The commands since the last step."""
        if not scheduler_output.total_num_scheduled_tokens and (self._since_s or self._writing):
            time.sleep(_PAUSE_S)
        commands, self._commands = self._commands, CacheCommands()
        return commands

    def update_connector_output(self, connector_output: StepResult) -> None:
        """Take up which commands the workers have carried out."""
        self._writing -= set(connector_output.finished_sending or ())
        for request in connector_output.finished_recving or ():
            name = self._reading.pop(request, "")
            if name:
                self._folder.remove(name)

    # -- the workers ----------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the tensors of this worker's layers."""
        self._worker.layers = kv_caches

    def start_load_kv(self, forward_context: object, **kwargs: object) -> None:
        """Begin the commands of this step."""
        del forward_context, kwargs
        self._worker.begin(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only once its cache has been read."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: object, attn_metadata: object, **kwargs: object
    ) -> None:
        """Nothing to do: caches are written when a request ends, not layer by layer."""

    def wait_for_save(self) -> None:
        """Nothing to wait for: blocks stay until they are written."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """Requests whose caches were written, and requests whose caches were read."""
        del finished_req_ids
        return self._worker.done()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be read and must be computed."""
        failed, self._worker.failed = self._worker.failed, set()
        return failed

    def shutdown(self) -> None:
        """End the thread."""
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()


class _Worker:
    """Writes and reads this rank's share of caches, one at a time, in a thread."""

    def __init__(self, folder: CacheFolder, parallel: CacheParallelConfig, all_heads: int) -> None:
        self.layers: dict[str, torch.Tensor] = {}
        self.failed: set[int] = set()
        self._folder = folder
        self._rank = int(parallel.rank)
        ranks = int(parallel.tensor_parallel_size)
        # With more ranks than heads, several ranks hold the same head.
        self._first_head = (self._rank % ranks) * all_heads // ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="caches")
        self._writing: dict[str, Future[None]] = {}
        self._reading: dict[str, tuple[Future[None], CacheCopy]] = {}

    def begin(self, commands: CacheCommands) -> None:
        for copy in commands.writes:
            self._writing[copy.request] = self._thread.submit(self._write, copy)
        for copy in commands.reads:
            self._reading[copy.request] = self._thread.submit(self._read, copy), copy

    def done(self) -> tuple[set[str], set[str]]:
        written = {name for name, future in self._writing.items() if future.done()}
        for name in written:
            del self._writing[name]
        read = {name for name, (future, _) in self._reading.items() if future.done()}
        for name in read:
            future, copy = self._reading.pop(name)
            if future.exception() is not None:
                self.failed |= set(copy.blocks)
        return written, read

    def _write(self, copy: CacheCopy) -> None:
        try:
            index = torch.tensor(copy.blocks)
            held = {name: layer.index_select(0, index) for name, layer in self.layers.items()}
            path = self._folder.part(copy.name, self._rank)
            partial = path.with_suffix(f".{self._rank}-new")
            save_file(held, partial, metadata={"first_head": str(self._first_head)})
            partial.replace(path)
        except (OSError, RuntimeError):
            self._folder.lose(copy.name)

    def _read(self, copy: CacheCopy) -> None:
        index = torch.tensor(copy.blocks)
        missing = {
            (name, self._first_head + head)
            for name, layer in self.layers.items()
            for head in range(layer.shape[1])
        }
        for number in range(copy.parts):
            with safe_open(self._folder.part(copy.name, number), framework="pt") as part:
                first_head = int(part.metadata()["first_head"])
                for name in set(part.keys()) & self.layers.keys():
                    missing -= self._take(part.get_slice(name), name, first_head, copy, index)
        if missing:
            raise LookupError(f"no part has the heads {sorted(missing)[:3]}")

    def _take(
        self, held: TensorSlice, name: str, first_head: int, copy: CacheCopy, index: torch.Tensor
    ) -> set[tuple[str, int]]:
        """Copy the heads that both ranks have; returns them."""
        layer = self.layers[name]
        heads = held.get_shape()[1]
        low = max(first_head, self._first_head)
        high = min(first_head + heads, self._first_head + layer.shape[1])
        if low >= high:
            return set()
        blocks = slice(copy.first, copy.first + len(copy.blocks))
        tiles = held[blocks, low - first_head : high - first_head]
        layer[index, low - self._first_head : high - self._first_head] = tiles
        return {(name, head) for head in range(low, high)}

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

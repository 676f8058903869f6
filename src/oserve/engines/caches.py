"""Inside vLLM's engines: the KV caches of requests that go on at another engine.

A KV connector (``--kv-transfer-config``), in the scheduler's process and each worker's. A request
that is given up while somebody asks for its cache keeps its blocks until every worker has written
its share of them to a folder; a request that begins with such a cache waits until the parts are
there and read, in a thread, while the others go on. Layers and KV heads decide who writes and reads
what, so the two engines may be of different tensor and pipeline sizes. Blocks are copied whole: the
two must have the same model, type and block size (``form``). Anything else is computed again.

Caches lie as vLLM's CPU attention has them: (blocks, KV heads, tokens of a block, key and value).
See ``wire.caches`` for what lies in the folder.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from oserve.engines.arguments import CACHES
from oserve.wire.caches import CacheFolder, Note, own_name, taken_name

# An engine in the middle of a long step gives a request up only after it.
_WAIT_S = 10.0
# With nothing to compute the engine would ask again at once, on cores that others need.
_PAUSE_S = 0.003
_FORGOTTEN_S = 120.0


@dataclass(frozen=True)
class CacheCopy:
    """Blocks of a request, ``first`` being the place of the first one among them."""

    request: str
    name: str
    blocks: list[int]
    first: int = 0
    parts: int = 0


@dataclass
class CacheCommands(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler has the workers do."""

    gives: list[CacheCopy] = field(default_factory=list)
    takes: list[CacheCopy] = field(default_factory=list)


class Connector(KVConnectorBase_V1):  # type: ignore[misc]
    """Both sides in one class, as vLLM wants it."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
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
        # Of the scheduler: what requests wait for and since when, and what goes on.
        self._orders = CacheCommands()
        self._since_s: dict[str, float] = {}
        self._ready: dict[str, tuple[str, Note, int]] = {}
        self._taking: dict[str, str] = {}
        self._giving: set[str] = set()
        # Requests that compute all by themselves, though they were to begin with a cache.
        self._computing: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache that is lost is computed again."""
        return False

    # -- the scheduler: taking in ---------------------------------------------------------------
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens come from elsewhere; ``None``: that is not known yet."""
        name = taken_name(request.kv_transfer_params)
        if not name or request.request_id in self._computing:
            return 0, False
        note = self._folder.note(name)
        since_s = self._since_s.setdefault(request.request_id, time.monotonic())
        if note is None and time.monotonic() - since_s < _WAIT_S:
            return None, False
        del self._since_s[request.request_id]
        fits = note is not None and note.form == self._form
        # At least one token is computed, to go on from.
        tokens = min(note.tokens, request.num_tokens - 1) if note is not None and fits else 0
        if note is None or tokens <= num_computed_tokens:
            # There may be no room yet: then it comes here again.
            self._computing.add(request.request_id)
            self._folder.remove(name)
            return 0, False
        self._ready[request.request_id] = name, note, num_computed_tokens
        return tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """There is room for the cache: have the workers read it."""
        found = self._ready.pop(request.request_id, None)
        if found is None or num_external_tokens == 0:
            return
        name, note, computed = found
        first = computed // self._block_tokens
        last = -(-(computed + num_external_tokens) // self._block_tokens)
        numbers = blocks.get_block_ids()[0][first:last]
        self._orders.takes.append(
            CacheCopy(request.request_id, name, list(numbers), first=first, parts=note.parts)
        )
        self._taking[request.request_id] = name

    # -- the scheduler: giving up ---------------------------------------------------------------
    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request ends here; its blocks stay until the workers have written what is asked for."""
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
        self._orders.gives.append(CacheCopy(request.request_id, name, block_ids[:count]))
        self._giving.add(request.request_id)
        return True, None

    def has_pending_push_work(self) -> bool:
        """Whether steps are needed though no request runs."""
        return bool(self._giving)

    def build_connector_meta(self, scheduler_output: Any) -> CacheCommands:
        """What was found since the last step."""
        if not scheduler_output.total_num_scheduled_tokens and (self._since_s or self._giving):
            time.sleep(_PAUSE_S)
        orders, self._orders = self._orders, CacheCommands()
        return orders

    def update_connector_output(self, connector_output: Any) -> None:
        """The workers have written or read what they were told to."""
        self._giving -= set(connector_output.finished_sending or ())
        for request in connector_output.finished_recving or ():
            name = self._taking.pop(request, "")
            if name:
                self._folder.remove(name)

    # -- the workers ----------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The tensors of the layers that are here."""
        self._worker.layers = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin what was ordered for this step."""
        del forward_context, kwargs
        self._worker.begin(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nobody computes with what is not there yet."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Caches are written when a request ends, not layer by layer."""

    def wait_for_save(self) -> None:
        """Blocks stay until they are written."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """Requests whose cache was written, and those whose was read."""
        del finished_req_ids
        return self._worker.done()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that have to be computed after all."""
        failed, self._worker.failed = self._worker.failed, set()
        return failed

    def shutdown(self) -> None:
        """End the thread."""
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()


class _Worker:
    """Writes and reads this rank's share of caches, one after the other in a thread."""

    def __init__(self, folder: CacheFolder, parallel: Any, all_heads: int) -> None:
        self.layers: dict[str, torch.Tensor] = {}
        self.failed: set[int] = set()
        self._folder = folder
        self._rank = int(parallel.rank)
        ranks = int(parallel.tensor_parallel_size)
        # More ranks than heads: some hold the same one.
        self._first_head = (self._rank % ranks) * all_heads // ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="caches")
        self._writing: dict[str, Future[None]] = {}
        self._reading: dict[str, tuple[Future[None], CacheCopy]] = {}

    def begin(self, orders: CacheCommands) -> None:
        for copy in orders.gives:
            self._writing[copy.request] = self._thread.submit(self._write, copy)
        for copy in orders.takes:
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
            raise LookupError(f"nobody had {sorted(missing)[:3]}")

    def _take(
        self, held: Any, name: str, first_head: int, copy: CacheCopy, index: torch.Tensor
    ) -> set[tuple[str, int]]:
        """Copy the heads that both have; tells which those are."""
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

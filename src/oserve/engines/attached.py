"""A server that OServe did not start: it is probed and monitored, and never started or ended.

Pure functions decide what each reply means; ``AttachedProbe`` sends the requests in turn.
"""

import asyncio
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from oserve.core import Endpoint, ReplicaPhase
from oserve.engines.probe import ProbeReply, ServedModel, base_url, served_models
from oserve.engines.replica import Prober, ReplicaTask, UnexpectedExit, cancel

# A server that does not answer gets no requests, but is not ended: acting early costs little.
_UNHEALTHY_AFTER = 3
_PATHS = ("/health", "/v1/models", "/ping", "/health/ready", "/v2/health/ready")
# TorchServe passes every path below this to the model, as a request for a prediction.
_PREDICTIONS = "/predictions/"
_PING = "/ping"
_OK, _MULTIPLE = 200, 300
_NO_PATH = frozenset({301, 302, 307, 308, 400, 404, 405, 415, 422, 501})
_NO_KEY = frozenset({401, 403, 407})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What probing a server has shown. ``trouble`` and ``remedy``: why it cannot serve, or empty.

    ``health``: the path that tells its health. ``models``: those that it lists, or ``None``.
    ``doubt``: what may be wrong although it is healthy.
    """

    trouble: str = ""
    remedy: str = ""
    health: str = ""
    models: tuple[ServedModel, ...] | None = None
    doubt: str = ""


def health_paths(url: str) -> list[str]:
    """Paths, from the server's root, that may tell its health; the likeliest first."""
    prefix = urlsplit(base_url(url)).path
    if prefix.startswith(_PREDICTIONS):
        return [_PING]
    own = [prefix + path for path in _PATHS]
    return own + [path for path in _PATHS if path not in own]


def answers_questions(url: str) -> bool:
    """Whether its paths serve more than predictions."""
    return not urlsplit(base_url(url)).path.startswith(_PREDICTIONS)


def of_health(path: str, reply: ProbeReply, *, has_key: bool) -> Finding:
    """What the reply of a health path means."""
    if reply.status == 0:
        return Finding(
            trouble=reply.why or "it does not answer",
            remedy="start it, or correct attach.url (and attach.ca_file for https)",
        )
    if reply.status in _NO_KEY:
        return Finding(trouble=f"{path} answers {reply.status}", remedy=_key_remedy(has_key))
    if _OK <= reply.status < _MULTIPLE:
        return Finding(health=path)
    if reply.status in _NO_PATH:
        return Finding(
            trouble=f"{path} answers {reply.status}",
            remedy="set attach.health to a path that tells its health",
        )
    return Finding(
        trouble=f"it is not healthy: {path} answers {reply.status}", remedy="look at its own log"
    )


def of_models(found: Finding, reply: ProbeReply, *, wanted: str, has_key: bool) -> Finding:
    """``found`` with the models that it lists. A server without such a list is healthy."""
    if reply.status in _NO_KEY:
        return Finding(trouble=f"/v1/models answers {reply.status}", remedy=_key_remedy(has_key))
    models = (served_models(reply.body) if reply.status == _OK else ()) or None
    doubt = ""
    if models and wanted and wanted not in [model.name for model in models]:
        names = ", ".join(model.name for model in models[:5])
        doubt = f"it lists {names} and not {wanted}; set attach.model if it refuses that"
    return Finding(health=found.health, models=models, doubt=doubt)


def of_completion(reply: ProbeReply, *, model: str, has_key: bool) -> Finding:
    """What a request for one token shows: whether path, key and model are right."""
    status = reply.status
    said = reply.body[:200].decode(errors="replace").strip()
    if status == 0:
        return Finding(trouble=reply.why or "it gave no answer", remedy="look at its own log")
    if status in _NO_KEY:
        return Finding(trouble=f"it answers {status}: {said}", remedy=_key_remedy(has_key))
    if status in {404, 405}:
        return Finding(
            trouble=f"it answers {status} for the model {model!r}: {said}",
            remedy="correct attach.model, or the path in attach.url (/v1/... is added to it)",
        )
    if status == 429 or status >= 500:
        return Finding(trouble=f"it answers {status}: {said}", remedy="look at its own log")
    if status >= 400:
        return Finding(doubt=f"it answers {status} to a request for one token: {said}")
    return Finding()


def _key_remedy(has_key: bool) -> str:
    if has_key:
        return "check the value of the variable that holds its key"
    return "set attach.api_key_env (or attach.headers) to what it asks for"


class AttachedProbe:
    """Probes one server, and remembers the path that told its health. ``wanted``: the model."""

    def __init__(self, probe: Prober, endpoint: Endpoint, wanted: str) -> None:
        self._probe = probe
        self._endpoint = endpoint
        self._wanted = wanted
        self._path = endpoint.health
        self._has_key = bool(endpoint.api_key or endpoint.headers)

    async def health(self) -> Finding:
        """Probe its health."""
        if self._path:
            answer = await self._probe.ask("GET", self._path)
            if answer.status not in _NO_PATH or self._endpoint.health:
                return of_health(self._path, answer, has_key=self._has_key)
            self._path = ""
        worst: Finding | None = None
        for path in health_paths(self._endpoint.url):
            answer = await self._probe.ask("GET", path)
            found = of_health(path, answer, has_key=self._has_key)
            if not found.trouble:
                self._path = path
            if not found.trouble or answer.status == 0:
                return found
            if answer.status not in _NO_PATH and worst is None:
                worst = found
        return worst or Finding(
            trouble="no path tells its health; probed were "
            + ", ".join(health_paths(self._endpoint.url)),
            remedy="set attach.health to one that does",
        )

    async def whole(self) -> Finding:
        """Probe its health, and the models that it lists."""
        found = await self.health()
        if found.trouble or not answers_questions(self._endpoint.url):
            return found
        path = urlsplit(base_url(self._endpoint.url)).path + "/v1/models"
        answer = await self._probe.ask("GET", path)
        return of_models(found, answer, wanted=self._wanted, has_key=self._has_key)

    async def try_out(self) -> Finding:
        """Probe that, and whether it answers a request for one token."""
        found = await self.whole()
        if found.trouble:
            return found
        prefix = urlsplit(base_url(self._endpoint.url)).path
        body: dict[str, object] = {"model": self._wanted, "max_tokens": 1}
        answer = await self._probe.ask("POST", prefix + "/v1/completions", {**body, "prompt": "Hi"})
        if answer.status in {404, 405}:
            # It may serve chats only.
            messages = [{"role": "user", "content": "Hi"}]
            chat = {**body, "messages": messages}
            answer = await self._probe.ask("POST", prefix + "/v1/chat/completions", chat)
        tried = of_completion(answer, model=self._wanted, has_key=self._has_key)
        if tried.trouble:
            return tried
        return Finding(health=found.health, models=found.models, doubt=tried.doubt or found.doubt)


@dataclass(kw_only=True)
class AttachedReplica(ReplicaTask):
    """The task that monitors it. ``wanted``: the model's name there."""

    endpoint: Endpoint
    wanted: str = ""

    async def run(self) -> UnexpectedExit | None:
        """See ``ReplicaTask.run``; an attached server never ends by itself."""
        stopped = asyncio.create_task(self.stop.wait())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({watch, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                watch.result()  # it ends by an error only
            return None
        finally:
            await cancel(watch, stopped)
            await self.probe.close()

    async def _watch(self) -> NoReturn:
        failed = 0
        ready = measures = False
        look = AttachedProbe(self.probe, self.endpoint, self.wanted)
        while True:
            found = await (look.health() if ready else look.whole())
            if not found.trouble:
                failed = 0
                if not ready:
                    length = found.models[0].max_model_len if found.models else 0
                    self.report(phase=ReplicaPhase.READY, max_model_len=length, detail=found.doubt)
                    ready = measures = True
                if measures and answers_questions(self.endpoint.url):
                    # Few servers have vLLM's metrics; the others are asked only once.
                    load = await self.probe.load()
                    measures = load is not None
                    if load is not None:
                        self.report(
                            running=load.running,
                            waiting=load.waiting,
                            kv_cache_usage=load.kv_cache_usage,
                        )
            else:
                failed += 1
                detail = f"{found.trouble}; {found.remedy}"
                if not ready:
                    self.report(detail=detail)
                elif failed >= _UNHEALTHY_AFTER:
                    self.report(phase=ReplicaPhase.LOADING, detail=detail)
                    ready = False
            await self.clock.sleep(self.settings.health_interval_s)

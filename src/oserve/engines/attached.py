"""A server that others run: asked how it is, and watched; never started or ended.

What each answer means is decided in pure functions; ``AttachedProbe`` asks the questions in turn.
"""

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from oserve.core import Endpoint, ReplicaPhase
from oserve.engines.probe import ProbeReply, ServedModel, base_url, served_models
from oserve.engines.replica import Prober, ReplicaTask, cancel

# One that does not answer is only taken out of the pool, not ended, so little is lost by doing it
# early.
_UNHEALTHY_AFTER = 3
_PATHS = ("/health", "/v1/models", "/ping", "/health/ready", "/v2/health/ready")
# TorchServe passes whatever is under this to the model, as a request for a prediction.
_PREDICTIONS = "/predictions/"
_PING = "/ping"
_OK, _MULTIPLE = 200, 300
_NO_PATH = frozenset({301, 302, 307, 308, 400, 404, 405, 415, 422, 501})
_NO_KEY = frozenset({401, 403, 407})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How a server was found. ``trouble``, with its ``remedy``: why it cannot serve, or nothing.

    ``health``: the path that tells so. ``models`` it lists; ``None`` if it lists none. ``doubt``:
    what may be wrong though it is well.
    """

    trouble: str = ""
    remedy: str = ""
    health: str = ""
    models: tuple[ServedModel, ...] | None = None
    doubt: str = ""


def health_paths(url: str) -> list[str]:
    """Paths, from the server's root, that may tell whether it is well; the likeliest first."""
    prefix = urlsplit(base_url(url)).path
    if prefix.startswith(_PREDICTIONS):
        return [_PING]
    own = [prefix + path for path in _PATHS]
    return own + [path for path in _PATHS if path not in own]


def answers_questions(url: str) -> bool:
    """Whether paths under its own are more than requests for predictions."""
    return not urlsplit(base_url(url)).path.startswith(_PREDICTIONS)


def of_health(path: str, answer: ProbeReply, *, has_key: bool) -> Finding:
    """What the answer of a health path says."""
    if answer.status == 0:
        return Finding(
            trouble=answer.why or "it does not answer",
            remedy="start it, or correct attach.url (and attach.ca_file for https)",
        )
    if answer.status in _NO_KEY:
        return Finding(trouble=f"{path} answers {answer.status}", remedy=_key_remedy(has_key))
    if _OK <= answer.status < _MULTIPLE:
        return Finding(health=path)
    if answer.status in _NO_PATH:
        return Finding(
            trouble=f"{path} answers {answer.status}",
            remedy="set attach.health to a path that says whether it is well",
        )
    return Finding(
        trouble=f"it is not well: {path} answers {answer.status}", remedy="look at its own log"
    )


def of_models(found: Finding, answer: ProbeReply, *, wanted: str, has_key: bool) -> Finding:
    """The same, with what its list of models says. Servers without such a list are well."""
    if answer.status in _NO_KEY:
        return Finding(trouble=f"/v1/models answers {answer.status}", remedy=_key_remedy(has_key))
    models = (served_models(answer.body) if answer.status == _OK else ()) or None
    doubt = ""
    if models and wanted and wanted not in [model.name for model in models]:
        names = ", ".join(model.name for model in models[:5])
        doubt = f"it lists {names} and not {wanted}; set attach.model if it refuses that"
    return Finding(health=found.health, models=models, doubt=doubt)


def of_completion(answer: ProbeReply, *, model: str, has_key: bool) -> Finding:
    """What a request for one token says: the last word on path, key and model."""
    status = answer.status
    said = answer.body[:200].decode(errors="replace").strip()
    if status == 0:
        return Finding(trouble=answer.why or "it gave no answer", remedy="look at its own log")
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
    """Asks one server; remembers which path told of its health. ``wanted``: the model's name."""

    def __init__(self, probe: Prober, endpoint: Endpoint, wanted: str) -> None:
        self._probe = probe
        self._endpoint = endpoint
        self._wanted = wanted
        self._path = endpoint.health
        self._has_key = bool(endpoint.api_key or endpoint.headers)

    async def health(self) -> Finding:
        """Whether it is well."""
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
            trouble="no path says whether it is well; asked were "
            + ", ".join(health_paths(self._endpoint.url)),
            remedy="set attach.health to one that does",
        )

    async def whole(self) -> Finding:
        """The same, and which models it lists."""
        found = await self.health()
        if found.trouble or not answers_questions(self._endpoint.url):
            return found
        path = urlsplit(base_url(self._endpoint.url)).path + "/v1/models"
        answer = await self._probe.ask("GET", path)
        return of_models(found, answer, wanted=self._wanted, has_key=self._has_key)

    async def try_out(self) -> Finding:
        """The same, and whether it answers a request for one token."""
        found = await self.whole()
        if found.trouble:
            return found
        prefix = urlsplit(base_url(self._endpoint.url)).path
        body: dict[str, Any] = {"model": self._wanted, "max_tokens": 1}
        answer = await self._probe.ask("POST", prefix + "/v1/completions", {**body, "prompt": "Hi"})
        if answer.status in {404, 405}:
            # It may speak in chats only.
            messages = [{"role": "user", "content": "Hi"}]
            chat = {**body, "messages": messages}
            answer = await self._probe.ask("POST", prefix + "/v1/chat/completions", chat)
        tried = of_completion(answer, model=self._wanted, has_key=self._has_key)
        if tried.trouble:
            return tried
        return Finding(health=found.health, models=found.models, doubt=tried.doubt or found.doubt)


@dataclass(kw_only=True)
class AttachedReplica(ReplicaTask):
    """The task that watches it. ``wanted``: the model's name there."""

    endpoint: Endpoint
    wanted: str = ""

    async def run(self) -> str | None:
        """See ``ReplicaTask.run``; it never ends by itself."""
        stopped = asyncio.create_task(self.stop.wait())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({watch, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return None if stopped.done() else watch.result()
        finally:
            await cancel(watch, stopped)
            await self.probe.close()

    async def _watch(self) -> str:
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
                    # Few have vLLM's metrics; the others need not be asked each second.
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

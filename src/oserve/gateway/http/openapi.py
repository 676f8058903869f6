"""The routes of the gateway as an OpenAPI document."""

from functools import cache

import msgspec

from oserve import __version__
from oserve.gateway.http.api_form import AUXILIARY, FORMS

_GET = {
    "/v1/models": "Models that are served",
    "/v1/models/{model}": "One of them",
    "/health": "Whether a replica serves; /ping is the same",
    "/ping": "Whether a replica serves",
    "/live": "Whether the gateway runs",
    "/version": "Version of OServe",
    "/load": "Running and waiting requests",
    "/metrics": "Metrics for Prometheus",
    "/oserve/v1/status": "State of the fleet",
    "/oserve/v1/switches": "Switches, newest last",
    "/oserve/v1/switches/{switch}": "One of them",
}
_POST = {
    "/invocations": "A chat or text completion, by its fields",
    "/oserve/v1/plan": "Plan for given traffic",
    "/oserve/v1/switch": "Switch to a plan",
    "/oserve/v1/nodes": "Cordon, uncordon or drain a node",
}
_STATUSES = {"200": {"description": "Done"}, "default": {"description": "An error with its reason"}}
_JSON = {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}


@cache
def openapi_document() -> bytes:
    """The document as JSON."""
    paths = {path: {"get": _operation(path, words)} for path, words in _GET.items()}
    passed = {path.decode(): "Passed on to a replica" for path in (*FORMS, *AUXILIARY)}
    for path, words in (passed | _POST).items():
        paths[path] = {"post": {**_operation(path, words), "requestBody": _JSON}}
    info = {"title": "OServe", "version": __version__}
    return msgspec.json.encode({"openapi": "3.1.0", "info": info, "paths": paths})


def _operation(path: str, words: str) -> dict[str, object]:
    operation: dict[str, object] = {"summary": words, "responses": _STATUSES}
    if "{" in path:
        name = path.partition("{")[2].rstrip("}")
        schema = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    return operation

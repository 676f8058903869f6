"""A pytest plugin for vLLM's own tests: each server that they start is one that runs already.

`GIVEN_SERVER` is its URL. What a test asks of its own server, such as flags, is left aside.
"""

import os
from urllib.parse import urlsplit

import tests.utils
import vllm.transformers_utils.repo_utils


class GivenServer(tests.utils.RemoteOpenAIServer):  # type: ignore[misc]
    """Their server, without a process of its own."""

    def __init__(self, *_: object, **__: object) -> None:
        parts = urlsplit(os.environ["GIVEN_SERVER"])
        self.host, self.port, self.uds = parts.hostname, parts.port, None
        self._shutdown_complete = True


class _NoHub:
    """Where their fixtures fetch adapters; no test of an adapter can pass without one."""

    def snapshot_download(self, **_: object) -> str:
        return ""


tests.utils.RemoteOpenAIServer = GivenServer
vllm.transformers_utils.repo_utils.hf_api = _NoHub

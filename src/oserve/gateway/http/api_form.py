"""The forms of generating requests: which fields hold the prompt, the limit, and what OServe adds.

Chat and text completions can be continued on another replica, since they can be rewritten as a text
completion of token ids. The other forms are passed on as they are: typed, ordered, retried until
the client has the first event, counted and recorded like those, but a stream of theirs stays where
it is, so a replica that leaves drains them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiForm:
    """One form of request.

    ``path``: of the replica. ``prompt``: the fields that form the prompt, if it is not read as that
    of a completion. ``limit``: the field with the limit of output tokens, if it is not a
    completion's. ``is_completion``: a chat or text completion: its streams move, and it takes
    ``stream_options`` and ``return_token_ids``. ``streams``: whether it may stream.
    ``priority_header``: vLLM takes the priority from a header only. ``anthropic``: errors have
    Anthropic's form.
    """

    path: bytes
    prompt: tuple[str, ...] = ()
    limit: str = ""
    is_completion: bool = False
    streams: bool = True
    priority_header: bool = False
    anthropic: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat completion."""
        return self is CHAT


CHAT = ApiForm(path=b"/v1/chat/completions", is_completion=True)
COMPLETION = ApiForm(path=b"/v1/completions", is_completion=True)
MESSAGES = ApiForm(
    path=b"/v1/messages",
    prompt=("system", "messages", "tools"),
    limit="max_tokens",
    priority_header=True,
    anthropic=True,
)
FORMS: dict[bytes, ApiForm] = {
    form.path: form
    for form in (
        CHAT,
        COMPLETION,
        MESSAGES,
        ApiForm(
            path=b"/v1/responses",
            prompt=("instructions", "input", "tools"),
            limit="max_output_tokens",
        ),
        ApiForm(path=b"/v1/chat/completions/batch", prompt=("messages",), streams=False),
        ApiForm(path=b"/generative_scoring", prompt=("query", "items"), streams=False),
    )
}
"""By path. A batch of chats and the items of a scoring request count as one long prompt."""

AUXILIARY: dict[bytes, ApiForm] = {
    path: ApiForm(path=path, streams=False)
    for path in (b"/tokenize", b"/detokenize", b"/v1/messages/count_tokens")
}
"""By path: calls that any replica answers without generating; not typed, ordered or recorded."""

ANTHROPIC = b"/v1/messages"
"""What the paths of Anthropic's API begin with."""


def invoked_form(names: set[str]) -> ApiForm:
    """The form of a body sent to ``/invocations``, by the names of its fields."""
    return CHAT if "messages" in names else COMPLETION

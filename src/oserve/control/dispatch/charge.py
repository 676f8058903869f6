"""What tenants were charged: a counter by tenant and tier, and the charge of each request."""

FlowKey = tuple[str, str]
"""Names of a tier and of a tenant."""


class ServiceCounter:
    """The service that one tenant had in one tier.

    ``level_s``: device-seconds charged by its weight, lifted after idle times. ``tag_s``,
    ``unbegun_s``: see ``FairQueue.engine_rank_s``. ``open``: charges not settled. ``woken``: the
    higher, the later it began to wait.
    """

    __slots__ = ("key", "level_s", "open", "tag_s", "unbegun_s", "weight", "woken")

    def __init__(self, key: FlowKey, weight: float) -> None:
        self.key = key
        self.weight = weight
        self.level_s = 0.0
        self.tag_s = 0.0
        self.unbegun_s = 0.0
        self.open = 0
        self.woken = 0


class Charge:
    """What one request was charged at one replica, in device-seconds.

    ``per_token_s``: of an output token. ``made_tokens``: output before it came there.
    ``begun``: it has had its first token there.
    """

    __slots__ = ("begun", "counter", "made_tokens", "paid_s", "per_token_s", "prompt_s")

    def __init__(
        self, counter: ServiceCounter, prompt_s: float, per_token_s: float, tokens: float
    ) -> None:
        self.counter = counter
        self.prompt_s = prompt_s
        self.per_token_s = per_token_s
        self.paid_s = prompt_s + per_token_s * tokens
        self.made_tokens = 0
        self.begun = False

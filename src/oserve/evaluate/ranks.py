"""The ranks of many requests at once."""

import numpy as np
from numpy.typing import NDArray

from oserve.control.dispatch.order import OrderPolicy


def ranks_s(
    order: OrderPolicy, arrival_s: NDArray[np.float64], prompt_tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``control.dispatch.order.rank_s`` of each request, in seconds."""
    window_s = order.freshest_first_s
    if window_s > 0.0:
        arrival_s = (2.0 * np.floor(arrival_s / window_s) + 1.0) * window_s - arrival_s
    penalty_s = np.minimum(order.max_penalty_s, order.penalty_s_per_token * prompt_tokens)
    found: NDArray[np.float64] = arrival_s + penalty_s
    return found

"""What is known of a checkpoint's stored weights besides the layers' matrices."""

from dataclasses import dataclass

from oserve.perf.layers import Matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """How a quantised checkpoint holds its weights, for the model as it is.

    ``block``: square blocks of weights share a scale, so no rank may hold a part of one; 0 without.
    ``divides_experts``: vLLM makes the experts' blocks smaller where tensor parallelism needs it.
    ``expert_unit``: the width to which vLLM fills up each rank's part of an expert. ``head_bytes``
    and ``outside_bytes``: per weight of the LM head and of what stands beside the layers.
    ``matrices``: of each layer, where all are alike. ``caveat``: what to know of such a checkpoint.
    """

    block: int = 0
    divides_experts: bool = False
    expert_unit: int = 1
    head_bytes: float = 2.0
    outside_bytes: float = 2.0
    matrices: tuple[Matrices, ...] = ()
    caveat: str = ""

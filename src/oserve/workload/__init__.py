"""Workload: from requests to workload types, arrival rates and expected lengths.

It does not know replicas. The gateway needs the length of a prompt before it is known, and that is
all that is exported here. What plans need is imported by module, since it loads more: ``types``
(k-means, scikit-learn), ``model``, ``rates``, ``classes`` and ``columns`` (NumPy).
"""

from oserve.workload.length import PromptLengthEstimator, PromptSize, classify

__all__ = ["PromptLengthEstimator", "PromptSize", "classify"]

"""Workload: from requests to workload types, arrival rates and expected lengths.

This package knows no replicas. It exports only what the gateway needs, the estimator of prompt
lengths. Planning imports the other modules by name, since they load more: ``types`` (k-means,
scikit-learn), ``model``, ``rates``, ``classes`` and ``columns`` (NumPy).
"""

from oserve.workload.length import PromptLengthEstimator, PromptSize, classify

__all__ = ["PromptLengthEstimator", "PromptSize", "classify"]

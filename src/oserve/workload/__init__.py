"""Workload: from requests to workload types and expected lengths.

It does not know replicas. Types are length classes of the prompt; the token count of a text is
estimated from its bytes, with a ratio learned from what engines report.
"""

from oserve.workload.length import PromptLengthEstimator, classify

__all__ = ["PromptLengthEstimator", "classify"]

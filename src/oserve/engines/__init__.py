"""Engines: the replicas of the live cluster - local vLLM processes and attached servers.

It starts, watches and ends them; it does not know plans, routing or requests. Why a replica should
start or end is decided elsewhere.
"""

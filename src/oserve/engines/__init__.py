"""Engines: real replicas behind the door - local vLLM processes and attached servers.

It starts, watches and ends them; it does not know plans, routing or requests. Why a replica should
start or end is decided elsewhere.
"""

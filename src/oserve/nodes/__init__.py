"""Nodes: what runs on each machine of a cluster besides keeper and engines, and what finds it.

The hatch is a node's one TLS port, through which servers, gateways and other nodes reach the
private sockets of the node. Nodes does not know plans, requests or routing.
"""

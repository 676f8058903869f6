"""Nodes: what runs on each machine of a cluster besides keeper and engines, and what finds it.

The hatch is a node's one TLS port, through which servers, gateways and other nodes reach the
private sockets of the node. The agent sees that keeper and hatch run; a directory tells the server
of nodes, through a Ray helper process or from a list of hosts. Nodes does not know plans, requests
or routing.
"""

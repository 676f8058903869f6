"""Gateway: the OpenAI-compatible HTTP API - parse, admit, route, stream, record.

It knows engines and plans only by the routing table, and parses forwarded chunks only where it
must.
"""

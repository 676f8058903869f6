"""Gateway: the OpenAI-compatible HTTP front - parse, admit, route, stream, record.

It does not know engines or plans beyond the routing table it is handed, and never looks inside the
chunks it passes on unless it must.
"""

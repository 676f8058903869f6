"""Look: the page that shows a server, read-only.

Status documents and request records become sections and points (pure); a feed sends what changed to
a bounded number of viewers. It does not know gateways, engines or the controller.
"""

"""Evaluate: plans and switches scored by simulation, the same on a server and in a study.

The server, ``oserve plan --verify``, ``oserve replay`` and the studies score with this code. It
knows the fleet simulator and nothing of HTTP, engines or settings.
"""

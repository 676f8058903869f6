"""Inside vLLM's workers: weights as they were loaded, sent to and taken from other engines.

``raw`` keeps and re-packs them, ``transfer`` moves them in threads while serving goes on,
``sockets`` and ``cuda`` carry the bytes. It imports torch, and vLLM where it must; it knows
neither plans nor replicas: boxes of parameters go to numbered ranks, as it is told.
"""

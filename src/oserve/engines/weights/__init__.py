"""Inside vLLM's workers: weights as loaded, sent to and received from other engines.

``raw`` keeps the weights and repacks them; ``transfer`` moves them in threads (``jobs``) while
serving goes on, part by part (``parts``); ``conversion`` converts them on arrival; ``sockets``,
``memory`` and ``cuda`` carry the bytes. It imports torch, and vLLM where it must. It knows neither
plans nor replicas: parts of parameters go to numbered ranks.
"""

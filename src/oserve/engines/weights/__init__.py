"""Inside vLLM's workers: weights as loaded, sent to and received from other engines.

``rank_weights`` carries out the server's commands; ``raw`` keeps the weights and repacks them;
``transfer`` moves them in threads while serving goes on; ``conversion`` converts them on arrival;
``sockets``, ``memory`` and ``cuda`` carry the bytes. It imports torch, and vLLM where it must. It
knows neither plans nor replicas: parts of parameters go to numbered ranks.
"""

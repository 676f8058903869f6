"""Switch: from one deployment plan to another while serving; pure decisions only.

Which part of which tensor each device holds (``layout``), who sends what to whom (``transfer``),
what becomes of running requests (``kv``), in which order replicas change (``waves``), what it costs
(``costs``), and the transaction that carries it through (``transaction``). It does not know
engines, processes, sockets or tensors' values: shells do what it says.
"""

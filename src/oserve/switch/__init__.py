"""Switch: from one deployment plan to another while serving; pure decisions only.

``layout`` says which part of which tensor each device holds, ``transfer`` which device sends what
to which, ``kv`` how running requests continue, ``waves`` in which order replicas change, ``costs``
what a switch costs. ``programme`` puts these together; ``transaction`` carries a wave through, all
or nothing, and ``journal`` makes it durable. Engines, processes, sockets and the values of tensors
are not known here; ``oserve.switching`` executes.
"""

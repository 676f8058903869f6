"""Control: policy. Observation in, actions out; the router; the loop; the door to a cluster.

It does not know vLLM, HTTP or the wall clock: a shell or the simulator stands behind the door.
"""

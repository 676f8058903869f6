"""Control: policy. From observations to actions: controller, control loop and cluster API.

It does not know vLLM, HTTP or the wall clock. The live cluster and the simulator implement its
cluster API.
"""

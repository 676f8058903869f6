"""Study: policies compared on simulated clusters, ours among them, all driven by the live loop.

A scene is what they share, a policy is how one runs the cluster, a tuner searches the settings of
each with the same effort, the runner drives the live control loop over a simulated fleet. It does
not know the command line or where traces lie.
"""

"""Study: policies compared on simulated clusters, OServe's among them.

A scene is what the policies share. A policy is one way to run the cluster. A tuner searches the
settings of each policy with the same effort. The runner drives the live control loop over a
simulated fleet. This room knows neither the command line nor where traces are stored.
"""

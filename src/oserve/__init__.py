"""OServe: different replicas of one large language model, side by side, behind one endpoint."""

__version__ = "0.1.0"

"""Forecast: from counts of past windows to those of the next, per workload type, with quantiles.

Pure: windows in, numbers out; no clock, no files but a trained LSTM's, nothing of replicas or
plans. ``Forecaster`` around a model of ``models`` is what a control loop holds; ``detect`` sees
sudden changes in counts of each second; ``backtest`` says how good all of it is on a series.
Modules are imported by name, since each loads little: torch and statsforecast only where they are
used.
"""

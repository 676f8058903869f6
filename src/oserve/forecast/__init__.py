"""Forecast: from counts of past windows to those of the next, per workload type, with quantiles.

Pure: windows in, numbers out. The package has no clock, reads no files except a trained LSTM, and
knows neither replicas nor plans. The control loop holds a ``Forecaster`` around a model of
``models``; ``detect`` finds sudden changes in per-second counts; ``backtest`` scores models on a
series. Callers import the modules by name, so that torch and statsforecast load only where they
are used.
"""

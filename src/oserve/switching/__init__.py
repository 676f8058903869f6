"""Executes switches: prepared, journalled, wave by wave, with a report.

``driver`` executes the waves of a programme (``switch.programme``) as transactions. ``tasks`` runs
their tasks on a cluster. ``journal`` stores them on disk. ``switcher`` runs one switch at a time,
by moving weights or by a roll-out with restarts.
"""

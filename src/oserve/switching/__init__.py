"""Switches of a live server: prepared, journalled, carried out wave by wave, told of.

``driver`` carries the waves of a programme (``switch.programme``) out as transactions, ``tasks``
does their tasks on a cluster, ``journal`` keeps them on disk, ``switcher`` decides between this and
a roll-out by restarts, one switch at a time.
"""

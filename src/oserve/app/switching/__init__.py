"""Switches of a live server: prepared, journalled, carried out wave by wave, told of.

``programme`` says what would be done, ``drive`` does it as transactions, ``record`` keeps it on
disk, ``switcher`` decides between this and a roll-out by restarts, one switch at a time.
"""

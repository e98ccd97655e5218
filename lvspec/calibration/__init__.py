"""Calibration: which settings keep a stated fidelity on a user's own clips, and how fast they are.

`calibrate.py` has the function; `README.md` says what it does and what a profile holds.
"""

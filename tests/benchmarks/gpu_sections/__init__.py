"""The parts of `gpu.py`, one file for each kind of figure."""

"""Benchmarks of the ops: one list of cases, correctness before timing, peers beside us.

README.md in this folder tells how to run them, how to read them and how each figure is made.
"""

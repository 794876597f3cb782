"""Merging on the CPU in one pass over memory: compiled kernels, and the statistics that turn every threshold into a lookup."""

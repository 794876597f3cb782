"""Merging on the CPU in one pass over memory: compiled kernels, and the statistics that make every threshold a lookup."""

"""evomerge: find the best way to merge language models."""

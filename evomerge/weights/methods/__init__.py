"""One file per merge method: formula, source and plain torch reference. Loaded by name through `evomerge.weights.registry`."""

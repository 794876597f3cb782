"""What each command of `evomerge` and each function of its Python interface does."""

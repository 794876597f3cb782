"""Merges to disk: a recipe becomes a complete Hugging Face model folder, streamed from the files of its models."""

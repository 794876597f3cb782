"""Merges to disk: writes a complete Hugging Face model folder for a recipe, streaming from the files of its models."""

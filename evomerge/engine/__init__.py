"""Inference engines whose weights are replaced in place, and every patch of third-party engine code."""

from evomerge.engine.base import Engine, GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest

__all__ = ["Engine", "GenerateRequest", "Generation", "LogLikelihood", "LogLikelihoodRequest"]

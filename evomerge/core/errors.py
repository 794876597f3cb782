"""The error tree. Every error a user can cause is an `EvomergeError`; the CLI prints it without a traceback (exit code 2).

A message says what is wrong, where (file, key, tensor), what was expected, what was found, and what to do.
"""


class EvomergeError(Exception):
    """Base of all errors that evomerge raises on purpose."""


class ConfigError(EvomergeError):
    """A setting, option or argument is wrong: an unknown key, a value out of range, a file that is not there or cannot be written."""


class SpaceError(EvomergeError):
    """A search space is empty, contradictory, or a point does not fit it."""


class RecipeError(EvomergeError):
    """A recipe cannot be read, written, or applied to the models it names."""


class CheckpointError(EvomergeError):
    """A model folder or a safetensors file is damaged, incomplete or unsafe."""


class EngineError(EvomergeError):
    """An inference engine could not start, could not take the weights, or answered nonsense."""


class EvaluationError(EvomergeError):
    """A task cannot be loaded or a candidate cannot be scored."""


class JournalError(EvomergeError):
    """The records of a run are damaged, locked, from another run, or do not have what was asked for."""


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers raises where it cannot load a folder. For `except loading_errors():`, so that nothing is imported without an error."""
    from huggingface_hub.errors import StrictDataclassError

    own = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    return *own, StrictDataclassError

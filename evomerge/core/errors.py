"""The error tree. Every error a user can cause is an `EvomergeError`; the CLI prints it without a traceback (exit code 2).

A message says what is wrong, where (file, key, tensor), what was expected, what was found, and what to do.
"""


class EvomergeError(Exception):
    """Base of all errors that evomerge raises on purpose."""


class ConfigError(EvomergeError):
    """A setting, option or argument is invalid: an unknown key, a value out of range, a file that is missing or cannot be written."""


class SpaceError(EvomergeError):
    """A search space is empty or contradictory, or a point does not belong to it."""


class RecipeError(EvomergeError):
    """A recipe cannot be read, written, or applied to the models it names."""


class CheckpointError(EvomergeError):
    """A model folder or a safetensors file is damaged, incomplete or unsafe."""


class EngineError(EvomergeError):
    """An inference engine could not start, could not load weights, or gave invalid answers."""


class EvaluationError(EvomergeError):
    """A task cannot be loaded or a candidate cannot be scored."""


class JournalError(EvomergeError):
    """The records of a run are damaged, locked or from another run, or do not contain what was requested."""


def loading_errors() -> tuple[type[Exception], ...]:
    """The exceptions that transformers raises if it cannot load a folder.

    For `except loading_errors():`, which imports huggingface_hub only if there is an error.
    """
    from huggingface_hub.errors import StrictDataclassError

    own = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    return *own, StrictDataclassError

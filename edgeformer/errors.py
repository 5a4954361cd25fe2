"""Everything edgeformer raises on purpose.

Each class also inherits the builtin that a caller would expect, so ``except ValueError`` keeps working. A message says
what was found, what was expected, and the next step.
"""


class EdgeformerError(Exception):
    """Base of all errors that edgeformer raises on purpose."""


class BundleError(EdgeformerError, ValueError):
    """A bundle is missing, damaged, or of another format version."""


class EngineUnavailable(EdgeformerError, RuntimeError):
    """An engine that was asked for by name cannot run here, or cannot run this graph."""


class InputError(EdgeformerError, ValueError):
    """An argument of a call (token ids, arrays, sampling options) is out of its range."""


class StateError(EdgeformerError, RuntimeError):
    """A state is used by two threads at once, after a failure, or with another model."""


class TemplateError(EdgeformerError, ValueError):
    """A chat template is missing, refuses the messages, or does not finish."""


class ExportError(EdgeformerError, RuntimeError):
    """A model cannot be exported as it stands; the message names the place and the fix."""


class ParityError(ExportError):
    """The exported graph does not give the numbers that PyTorch gives."""


class TrainingError(EdgeformerError, RuntimeError):
    """A training run cannot start, resume or continue."""


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not blank; empty where there is none. Libraries write pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


class EdgeformerWarning(UserWarning):
    """What a caller should know although the call goes on."""

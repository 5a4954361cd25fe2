"""The exceptions and warnings of edgeformer.

Each class also inherits from the matching builtin, so ``except ValueError`` works. A message gives what was found, what
was expected, and the next step.
"""

import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager


class EdgeformerError(Exception):
    """The base class of all exceptions that edgeformer raises."""


class BundleError(EdgeformerError, ValueError):
    """A bundle is missing, damaged, or of another format version."""


class EngineUnavailable(EdgeformerError, RuntimeError):
    """The requested engine cannot run on this machine, or cannot run this graph."""


class InputError(EdgeformerError, ValueError):
    """An argument of a call (token ids, arrays, sampling options) is out of its range."""


class ContextError(InputError):
    """A text is longer than the model's context."""


class QueueFull(EdgeformerError, RuntimeError):
    """A scheduler takes no more requests until some have ended."""


class StateError(EdgeformerError, RuntimeError):
    """A state was used by two threads at once, after a failed call, or with another model."""


class GrammarError(StateError, InputError):
    """The grammar of an answer shows only while it is written that it is too large, or that no text can fulfil it."""


class OutOfMemory(EdgeformerError, MemoryError):
    """The memory for a load or a step is not there; states are as before."""


class TemplateError(EdgeformerError, ValueError):
    """A chat template is missing, rejects the messages, or does not terminate."""


class ExportError(EdgeformerError, RuntimeError):
    """A model cannot be exported; the message names the cause, where it is, and a fix."""


class ParityError(ExportError):
    """The outputs of the exported graph differ from PyTorch's by more than the tolerance."""


class TrainingError(EdgeformerError, RuntimeError):
    """A training run cannot start, resume or continue."""


@contextmanager
def typed_errors(doing: str, kind: type[EdgeformerError] = EdgeformerError) -> Iterator[None]:
    """Turns a bare MemoryError of the block into OutOfMemory, and other bare errors into `kind`; `doing` is in both.

    For calls of the C++ module, whose own checks raise ValueError and the like for what lowering should have refused.
    """
    try:
        yield
    except EdgeformerError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"Out of memory while {doing}; states are as before. {error}".rstrip()) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise kind(f"{type(error).__name__} while {doing}: {error}. The bundle may be damaged.") from error


@contextmanager
def typed_out_of_memory(doing: str) -> Iterator[None]:
    """Turns a MemoryError of the block, and an OSError for want of memory, into OutOfMemory."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise OutOfMemory(f"Out of memory while {doing}. {error}".rstrip()) from error


def check_memory(size: int, doing: str) -> None:
    """Raises OutOfMemory if `size` bytes cannot be allocated: before calls of libraries that end the process then."""
    with typed_out_of_memory(f"{doing}: it takes about {size / 1e6:,.1f} MB"):
        mmap.mmap(-1, size).close()


def first_line(error: BaseException) -> str:
    """The first non-blank line of the error's text, because some libraries write many; empty if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def pip_install(*packages: str) -> str:
    """The command that installs these packages, in the versions that edgeformer's own metadata gives.

    Messages name packages, not extras: no package index has edgeformer, so `pip install edgeformer[...]` fails.
    """
    import re
    import shlex
    from importlib.metadata import PackageNotFoundError, requires

    try:
        required = requires("edgeformer") or []
    except PackageNotFoundError:  # it runs from its source tree
        required = []
    versions: dict[str, str] = {}  # "torch" -> "torch==2.13.*"
    for line in required:
        requirement = line.partition(";")[0].strip()
        versions.setdefault(re.split(r"[^\w.-]", requirement)[0], requirement)
    return " ".join(["pip install", *(shlex.quote(versions.get(name, name)) for name in packages)])


class EdgeformerWarning(UserWarning):
    """A problem that does not stop the call."""

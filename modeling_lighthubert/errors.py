"""How our commands fail: a mistake of the user is one line and exit status 2, a bug is a traceback."""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


LIBRARY_ERRORS = (ValueError, OSError, StrictDataclassError, SafetensorError)
"""How libraries say that a file, a configuration or a value is wrong."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How systems say that a disk is full."""


class UserError(ValueError):
    """Something is wrong with what the user gave. The message says what was given, what is allowed, and what to do."""


class MissingExtraError(UserError, ImportError):
    """A package is needed that an extra of this project installs."""


@contextmanager
def user_error(prefix: str = "", errors: tuple[type[Exception], ...] = LIBRARY_ERRORS) -> Iterator[None]:
    """Inside the block, an error of a library in `errors` is the user's mistake.

    A `ConnectionError` is not, and passes.

    Args:
        errors: `(Exception,)` where a library reads a file without checking what is in it: a number in place of a list
            then is a `TypeError` or an `AttributeError` of the library.

    Raises:
        UserError: with the message of the error, behind `prefix`, and with its type if the message was not written for
            users.
    """
    try:
        yield
    except (UserError, ConnectionError):
        raise
    except errors as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None  # it names the validator first
        kind = "" if isinstance(error, LIBRARY_ERRORS) else f"{type(error).__name__}: "
        raise UserError(f"{prefix}{kind}{cause or error}") from error


def optional_module(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports `module`, which `extra` installs.

    Raises:
        MissingExtraError: it is not installed. The message names the `purpose` and the command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the extra {extra!r}: pip install 'lighthubert-transformers[{extra}]' ({error})"
        ) from error


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs the `main` of a command, and ends the process with its exit status.

    A `UserError` and a full disk are printed as one line, with status 2; a Hub that cannot be reached and a loss that
    is no number, which no option could have ruled out, as one line with status 1. Everything else is a bug and keeps
    its traceback.
    """
    try:
        sys.exit(main())
    except UserError as error:
        status, message = 2, str(error)
    except (ConnectionError, FloatingPointError) as error:
        status, message = 1, str(error)
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust, whose errors have the number in their text
        numbers = [f"os error {number})" for number in NO_ROOM]
        if getattr(error, "errno", None) not in NO_ROOM and not any(number in str(error) for number in numbers):
            raise
        status, message = 2, f"{error}: make room on the disk, and give the same command once more"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)

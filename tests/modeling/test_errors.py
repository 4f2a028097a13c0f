"""Claims about failing: a mistake of the user is one line and exit status 2, a bug is a traceback."""

import errno
import sys

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import SafetensorError

from modeling_lighthubert.errors import MissingExtraError, UserError, optional_module, run, user_error


def ended(capsys, main) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stopped:
        run(main)
    return (stopped.value.code or 0, *capsys.readouterr())


def raise_(error: BaseException):
    raise error


# Commands


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such subnet:\n  choose\tanother"), 2, "error: no such subnet: choose another\n"),
        (MissingExtraError("needs more"), 2, "error: needs more\n"),
        (ConnectionError("the Hub is away"), 1, "error: the Hub is away\n"),
        (FloatingPointError("the loss is NaN"), 1, "error: the loss is NaN\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_is_no_bug_is_one_line_on_standard_error(capsys, error, status, line):
    def main():
        print("so far")
        raise error

    assert ended(capsys, main) == (status, "so far\n", line)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError("a bug")], ids=repr)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        run(lambda: raise_(error))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_one_line(capsys, error):
    status, _, line = ended(capsys, lambda: raise_(error))
    assert status == 2
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "make room on the disk" in line


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_ends_with_the_status_that_it_returns(capsys, result, status):
    assert ended(capsys, lambda: result) == (status, "", "")


# Errors of libraries


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        FileNotFoundError("wrong"),
        SafetensorError("wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_library_becomes_the_users_mistake_with_a_prefix(error):
    with pytest.raises(UserError, match=r"^file\.json: wrong$") as raised, user_error("file.json: "):
        raise error
    assert raised.value.__cause__ is error


def test_a_refused_configuration_says_why_without_the_name_of_a_validator():
    cause = ValueError("hidden_size=3 is not a multiple")
    with pytest.raises(UserError, match=r"^model: hidden_size=3 is not a multiple$"), user_error("model: "):
        raise StrictDataclassClassValidationError("validate_architecture", cause) from cause


def test_a_users_mistake_is_not_prefixed_twice():
    with pytest.raises(UserError, match=r"^inner: wrong"), user_error("outer: "), user_error("inner: "):
        raise ValueError("wrong")


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ConnectionError])
def test_other_errors_pass(error):
    with pytest.raises(error) as raised, user_error("prefix: "):
        raise error("other")
    assert type(raised.value) is error


# Extras


def test_a_package_that_is_there_is_imported():
    assert optional_module("json.decoder", "extra", "this").__name__ == "json.decoder"


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError) as raised:
        optional_module("onnxscript", "onnx", "writing an ONNX file")
    assert str(raised.value).startswith(
        "writing an ONNX file needs the extra 'onnx': pip install 'lighthubert-transformers[onnx]'"
    )
    assert "onnxscript" in str(raised.value)
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, UserError)

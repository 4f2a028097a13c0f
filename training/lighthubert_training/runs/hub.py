"""The Hub: uploading what a run made, and saying in two sentences when that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_lighthubert.errors import UserError, user_error


UNPUBLISHED = ["checkpoint-*", "unfinished-*", ".unfinished-*", "tensorboard/*", "runs/*", "training_args.bin"]
"""Patterns of what stays here: checkpoints, files that are being written, logs, and a pickle."""


@contextmanager
def reaching_hub(failure: str, remedy: str) -> Iterator[None]:
    """Inside the block, whatever keeps the Hub from doing its part is said in two sentences.

    Args:
        failure: what was not done then, such as "me/model could not be pushed".
        remedy: what to do about it.

    Raises:
        ConnectionError: the Hub was not reached, or refused. A token that the client's message might hold is hidden.
        UserError: the Hub has no names like the one that was given.
    """
    try:
        yield
    except HFValidationError as error:
        raise UserError(without_token(f"{failure}: {error}")) from error
    except Exception as error:  # which, depends on the client's HTTP library
        # what the Hub refuses can be a ValueError as well; other ones, and these, are mistakes of the user or of ours
        is_refusal = isinstance(error, HfHubHTTPError)
        if isinstance(error, ValueError | TypeError | LookupError | AttributeError) and not is_refusal:
            raise
        raise ConnectionError(f"{failure} ({without_token(str(error))}). {remedy}") from error


def without_token(text: str) -> str:
    """`text`, with the token for the Hub hidden should it ever be there."""
    token = get_token()
    return text.replace(token, "***") if token else text


def check_push(folder: str | Path, hub_model_id: str | None) -> None:
    """Refuses, before a run, what the Hub would refuse at its end; the arguments are those of `push_folder`.

    Raises:
        UserError: the Hub has no names like that of the repository, or nobody is logged in.
    """
    with user_error("--push_to_hub: "):
        validate_repo_id(hub_model_id or Path(folder).resolve().name)
    if get_token() is None:
        raise UserError("--push_to_hub: nobody is logged in. Do so with `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, hub_model_id: str | None) -> None:
    """Uploads a folder without its checkpoints and logs, to a repository that is made if it is not there.

    Args:
        hub_model_id: name of the repository. Default: that of the folder.

    Raises:
        ConnectionError: the Hub cannot be reached, or refuses. The folder is as it was.
        UserError: the Hub has no names like that of the repository.
    """
    folder = folder.resolve()
    name = hub_model_id or folder.name
    remedy = f"The model is in {folder}: `hf upload {name} {folder}` sends it"
    with reaching_hub(f"{name} could not be pushed", remedy):
        repo_id = HfApi().create_repo(name, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=UNPUBLISHED)

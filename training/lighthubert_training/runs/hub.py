"""The Hub: uploading what a run made, and saying in one sentence when that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError


UNPUBLISHED = ["checkpoint-*", "unfinished-*", ".unfinished-*", "tensorboard", "runs", "training_args.bin"]


@contextmanager
def reaching_hub(failure: str, remedy: str) -> Iterator[None]:
    """Inside the block, whatever keeps the Hub from doing its part is said in two sentences.

    Args:
        failure: what was not done then, such as "me/model could not be pushed".
        remedy: what to do about it.

    Raises:
        ConnectionError: the Hub was not reached, or refused. A token that the client's message might hold is hidden.
    """
    try:
        yield
    except Exception as error:  # which, depends on the client's HTTP library
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        raise ConnectionError(f"{failure} ({without_token(str(error))}). {remedy}") from error


def without_token(text: str) -> str:
    """`text`, with the token for the Hub hidden should it ever be there."""
    token = get_token()
    return text.replace(token, "***") if token else text


def push_folder(folder: Path, hub_model_id: str | None) -> None:
    """Uploads a folder without its checkpoints and logs.

    Args:
        hub_model_id: repository. Default: the name of the folder.

    Raises:
        ConnectionError: the Hub cannot be reached, or refuses. The folder is as it was.
    """
    folder = folder.resolve()
    name = hub_model_id or folder.name
    remedy = f"The model is in {folder}: `hf upload {name} {folder}` sends it"
    with reaching_hub(f"{name} could not be pushed", remedy):
        repo_id = HfApi().create_repo(name, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=UNPUBLISHED)

"""Uploading what a run made."""

from pathlib import Path

from huggingface_hub import HfApi


UNPUBLISHED = ["checkpoint-*", "unfinished-*", "tensorboard", "runs", "training_args.bin"]


def push_folder(folder: Path, hub_model_id: str | None) -> None:
    """Uploads a folder without its checkpoints and logs. A Hub that cannot be reached loses nothing.

    Args:
        hub_model_id: repository. Default: the name of the folder.
    """
    folder = folder.resolve()
    name = hub_model_id or folder.name
    try:
        repo_id = HfApi().create_repo(name, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=UNPUBLISHED)
    except Exception as error:  # which, depends on the client's HTTP library; the model is saved whatever it is
        print(f"{name} could not be pushed ({error}). The model is in {folder}: `hf upload {name} {folder}` sends it")

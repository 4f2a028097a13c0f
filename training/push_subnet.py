"""Cuts a subnet out and publishes it on the Hub, with its processor, licence and card.

    python training/push_subnet.py --model_name_or_path supernet --subnet search/best.json --license apache-2.0 \\
        --results search/results.json --training_data "LibriSpeech, 960 hours" --repo_id me/lighthubert-27m --tag v1

The same command once more changes nothing, and goes on where a lost connection has left it: a push is one commit, or
none. A repository that holds another model is left alone.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, HfArgumentParser
from transformers.utils import logging

from lighthubert_training.cards.subnet import FACTS_FILE, measured_speed, read_results, render_card, subnet_facts
from lighthubert_training.runs.options import option, parse_recipe
from modeling_lighthubert.export import copy_processor, torch_runner, write_export
from modeling_lighthubert.loading import load_cut_lighthubert
from modeling_lighthubert.search_space import search_space_from


LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"


@dataclass
class PushArguments:
    """What is published, where, and what its card says."""

    model_name_or_path: str = option(help="Supernet, or a model that was cut already.")
    repo_id: str = option(help="Repository on the Hub, such as me/lighthubert-27m.")
    training_data: str = option(help="What the model was trained on, in words, for the card.")
    subnet: str | None = option(None, "Name or JSON file of a subnet. Default: the selected one.")
    format: str = option(
        "transformers",
        "transformers: a cut model with its code; hubert: a stock HuBERT.",
        choices=("transformers", "hubert"),
    )
    dtype: str = option("float32", "Of weights.", choices=("float32", "bfloat16"))
    license: str | None = option(None, "Default: what the supernet's card says.")
    supernet_name: str | None = option(None, "What the card calls the supernet. Default: its Hub id, or its folder.")
    teacher: str | None = option(None, "What the supernet was distilled from.")
    results: list[str] = option(
        [], "JSON files with figures: results.json of a search, eval_results.json of a training run."
    )
    results_dataset: str | None = option(None, "What the results were measured on.")
    language: str | None = option(None, "Language code for the card.")
    private: bool = option(False, "Create the repository as a private one.")
    revision: str | None = option(None, "Branch to push to; it is created if it is not there. Default: main.")
    tag: str | None = option(None, "Tag for what is pushed. Tags do not move.")
    create_pr: bool = option(False, "Open a pull request instead.")
    overwrite: bool = option(False, "Replace another model that the repository holds.")
    repeats: int = option(20, "Timed runs of 5 s of audio.")

    def __post_init__(self) -> None:
        if self.create_pr and (self.tag or self.revision):
            raise ValueError("create_pr: a pull request has no tag, and is made against main")


def parent_license(source: str) -> str | None:
    """What the card beside the supernet says."""
    try:
        return ModelCard.load(source if not Path(source).exists() else Path(source) / "README.md").data.license
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError):
        return None


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both facts are of the same subnet of the same supernet, however it was trained."""
    return all(one.get(name) == other.get(name) for name in ("cut_from", "subnet", "form", "task"))


class Publication:
    """One subnet on its way to one repository.

    Attributes:
        model: cut.
        facts: what its card is made of.
        replaces: whether files of another model have to go.
    """

    def __init__(self, arguments: PushArguments):
        self.arguments, self.api = arguments, HfApi()
        source = arguments.model_name_or_path
        license = arguments.license or parent_license(source)
        if license is None:
            raise ValueError(f"the card of {source} names no licence: give --license, such as apache-2.0")
        self.license = license
        space = getattr(AutoConfig.from_pretrained(source), "search_space", None)
        self.space = None if space is None else search_space_from(space)
        self.model = load_cut_lighthubert(source, arguments.subnet)
        name = arguments.supernet_name or (Path(source).resolve().name if Path(source).exists() else source)
        self.facts = subnet_facts(self.model, name, arguments.format)
        self.facts |= {"teacher": arguments.teacher} if arguments.teacher else {}
        names = None
        if self.space is not None:
            names = [name for name, subnet in self.space.named.items() if subnet == self.model.subnet]
        self.facts["results"] = read_results(arguments.results, self.facts["subnet"], names)
        self.replaces = arguments.overwrite

    def published(self) -> dict[str, Any] | None:
        """The facts of the model that the branch holds; `None` if it holds none.

        Raises:
            ValueError: it holds another model, and nobody said that it may be replaced.
        """
        arguments, revision = self.arguments, self.arguments.revision or "main"
        try:
            names = {file.rfilename for file in self.api.repo_info(arguments.repo_id, revision=revision).siblings}
        except RepositoryNotFoundError:
            return None
        except RevisionNotFoundError:
            self.replaces = True  # a new branch begins with what main holds
            return None
        if FACTS_FILE in names:
            file = self.api.hf_hub_download(arguments.repo_id, FACTS_FILE, revision=revision)
            facts = json.loads(Path(file).read_text())
            if is_same_model(facts, self.facts):
                return facts
        elif names <= {".gitattributes", "README.md", "LICENSE"}:
            return None
        if not arguments.overwrite and not arguments.create_pr:
            raise ValueError(
                f"{arguments.repo_id} ({revision}) holds another model: choose another --repo_id or --revision, open a"
                " pull request with --create_pr, or replace it with --overwrite"
            )
        return None

    def check_tag(self) -> None:
        """Raises ValueError: the tag is there, on another commit than the newest."""
        arguments = self.arguments
        try:
            refs = self.api.list_repo_refs(arguments.repo_id)
        except RepositoryNotFoundError:
            return
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        if arguments.tag in tags and tags[arguments.tag] != heads.get(arguments.revision or "main"):
            raise ValueError(
                f"the tag {arguments.tag} of {arguments.repo_id} is on an earlier commit, and tags do not move:"
                " choose another"
            )

    def write(self, folder: Path, published: dict[str, Any] | None) -> None:
        """Everything that is pushed. The speed of weights that are published already is not measured anew: otherwise
        no push would be like the one before."""
        arguments = self.arguments
        exported, file = write_export(self.model, folder, arguments.format, getattr(torch, arguments.dtype))
        copy_processor(arguments.model_name_or_path, folder)
        with file.open("rb") as weights:
            self.facts["sha256"] = hashlib.file_digest(weights, "sha256").hexdigest()
        if published is not None and published.get("sha256") == self.facts["sha256"] and "speed" in published:
            self.facts["speed"] = published["speed"]
        else:
            largest = None if self.space is None else "largest"
            largest = torch_runner(load_cut_lighthubert(arguments.model_name_or_path, largest))
            self.facts["speed"] = measured_speed(exported, largest, arguments.dtype, arguments.repeats)
        (folder / FACTS_FILE).write_text(json.dumps(self.facts, indent=2) + "\n")
        card = render_card(
            self.facts,
            arguments.repo_id,
            self.license,
            arguments.training_data,
            dataset=arguments.results_dataset,
            language=arguments.language,
        )
        card.save(folder / "README.md")
        parent = Path(arguments.model_name_or_path) / "LICENSE"
        if parent.exists() or self.license == "apache-2.0":
            shutil.copy(parent if parent.exists() else LICENSE, folder / "LICENSE")

    def push(self, folder: Path) -> str:
        """Makes the repository, the branch, one commit and the tag, as far as they are missing.

        Returns:
            Where it can be seen.
        """
        arguments, api = self.arguments, self.api
        api.create_repo(arguments.repo_id, private=arguments.private or None, exist_ok=True)
        if arguments.revision:
            api.create_branch(arguments.repo_id, branch=arguments.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=arguments.repo_id,
            folder_path=folder,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            delete_patterns="*" if self.replaces else None,
            commit_message=f"LightHuBERT subnet, {self.facts['num_parameters']:,} parameters",
        )
        if arguments.tag:
            tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(arguments.repo_id).tags}
            if tags.get(arguments.tag, commit.oid) != commit.oid:
                raise ValueError(f"{commit.commit_url} is pushed, but the tag {arguments.tag} is on an earlier commit")
            api.create_tag(arguments.repo_id, tag=arguments.tag, revision=commit.oid, exist_ok=True)
        return commit.pr_url or commit.commit_url


@contextmanager
def reaching(repo_id: str) -> Iterator[None]:
    """Says in one sentence that the Hub was not reached, or refused."""
    try:
        yield
    except ValueError as error:
        if not isinstance(error, HfHubHTTPError):  # what the Hub refuses can be both
            raise
        raise ConnectionError(f"{repo_id}: {error}") from error
    except Exception as error:  # which, depends on the client's HTTP library
        raise ConnectionError(
            f"{repo_id} could not be pushed ({error}). It is at its last commit: give the same command once more to go"
            " on"
        ) from error


def publish(arguments: PushArguments) -> str:
    """Cuts, writes and pushes.

    Returns:
        Where it can be seen.

    Raises:
        ValueError: something that was asked for is not possible; the message says what is.
        ConnectionError: the Hub cannot be reached, or refuses. The repository is at its last commit.
    """
    publication = Publication(arguments)
    with reaching(arguments.repo_id):
        published = publication.published()
        if arguments.tag:
            publication.check_tag()
    with tempfile.TemporaryDirectory() as folder:
        publication.write(Path(folder), published)
        with reaching(arguments.repo_id):
            return publication.push(Path(folder))


def without_token(text: str) -> str:
    """`text`, in which the token for the Hub is blotted out should it ever be there."""
    token = get_token()
    return text.replace(token, "***") if token else text


def main() -> None:
    parser = HfArgumentParser(PushArguments, description=__doc__.splitlines()[0])
    (arguments,) = parse_recipe(parser)
    logging.set_verbosity_error()
    try:
        print(publish(arguments))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {without_token(str(error))}\n")


if __name__ == "__main__":
    main()

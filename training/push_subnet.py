"""Cuts a subnet out and publishes it on the Hub, with its processor, licence and card.

    python training/push_subnet.py --model_name_or_path supernet --subnet search/best.json --license apache-2.0 \\
        --results search/results.json --training_data "LibriSpeech, 960 hours" --repo_id me/lighthubert-27m --tag v1

The same command once more changes nothing, and goes on where a lost connection has left it: a push is one commit, or
none. A repository that holds another model is left alone.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from lighthubert_training.cards.render import APACHE_LICENSE, public_name, save_card
from lighthubert_training.cards.subnet import (
    FACTS_FILE,
    measured_speed,
    read_results,
    render_subnet_card,
    subnet_facts,
)
from lighthubert_training.runs.hub import reaching_hub
from lighthubert_training.runs.options import OptionParser, option, parse_options
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.export import copy_processor, torch_runner, write_export
from modeling_lighthubert.files import write_json
from modeling_lighthubert.loading import load_config, load_cut_lighthubert
from modeling_lighthubert.runtimes import write_onnx_folder
from modeling_lighthubert.search_space import search_space_from


@dataclass
class PushArguments:
    """What is published, where, and what its card says."""

    model_name_or_path: str = option(help="Folder or Hub id of a supernet, or of a model that was cut already.")
    repo_id: str = option(help="Repository on the Hub, such as me/lighthubert-27m.")
    training_data: str = option(help="Training data of the model, in words, for the card.")
    subnet: str | None = option(None, "Name or JSON file of a subnet. Default: the selected one.")
    format: str = option(
        "transformers",
        "Format of the model: transformers is a cut model with its code, hubert is a stock HuBERT.",
        choices=("transformers", "hubert"),
    )
    dtype: str = option("float32", "Dtype of the weights.", choices=("float32", "bfloat16"))
    onnx: bool = option(True, "Whether to add ONNX files in fp32, fp16 and 8 bits. Needs the extra onnx.")
    license: str | None = option(None, "Licence, such as apache-2.0. Default: that of the supernet's card.")
    supernet_name: str | None = option(None, "Name of the supernet in the card. Default: its Hub id, or its folder.")
    teacher: str | None = option(None, "Name of the model that the supernet was distilled from.")
    results: list[str] = option(
        [], "JSON files with figures: results.json of a search, eval_results.json of a training run."
    )
    results_dataset: str | None = option(None, "Name of the data that the results were measured on.")
    language: str | None = option(None, "Language code for the card.")
    private: bool = option(False, "Whether a new repository is a private one.")
    revision: str | None = option(None, "Branch to push to; it is created if it is not there. Default: main.")
    tag: str | None = option(None, "Tag for what is pushed. Tags do not move.")
    create_pr: bool = option(False, "Whether to open a pull request instead.")
    overwrite: bool = option(False, "Whether to replace another model of the repository.")
    repeats: int = option(20, "Number of timed runs of 5 s of audio.")

    def __post_init__(self) -> None:
        if self.create_pr and (self.tag or self.revision):
            raise ValueError("--create_pr: a pull request has no tag, and is made against main")
        if self.repeats < 1:
            raise ValueError("--repeats has to be at least 1")


def parent_license(source: str) -> str | None:
    """The licence that the card beside the supernet names, if there is one."""
    try:
        return ModelCard.load(source if not Path(source).exists() else Path(source) / "README.md").data.license
    except (OSError, ValueError, EntryNotFoundError):
        return None


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both facts are of the same subnet of the same supernet, however it was trained."""
    return all(one.get(name) == other.get(name) for name in ("cut_from", "subnet", "form", "task"))


class Publication:
    """One subnet on its way to one repository.

    Attributes:
        model: the subnet, cut out.
        space: the search space of the supernet; `None` of a model that was cut already.
        facts: what the card is made of.
        replaces: whether files that are not pushed are deleted from the branch.

    Raises:
        UserError: there is no such model or subnet, no licence, or the results are not those of the subnet.
    """

    def __init__(self, arguments: PushArguments):
        self.arguments, self.api, self.replaces = arguments, HfApi(), arguments.overwrite
        source = arguments.model_name_or_path
        space = getattr(load_config(source), "search_space", None)
        self.space = None if space is None else search_space_from(space)
        license = arguments.license or parent_license(source)
        if license is None:
            raise UserError(f"the card of {source} names no licence: give --license, such as apache-2.0")
        self.license = license
        self.model = load_cut_lighthubert(source, arguments.subnet)
        self.facts = subnet_facts(self.model, arguments.supernet_name or public_name(source), arguments.format)
        self.facts |= {"teacher": arguments.teacher} if arguments.teacher else {}
        names = None
        if self.space is not None:
            names = [name for name, subnet in self.space.named.items() if subnet == self.model.subnet]
        self.facts["results"] = read_results(arguments.results, self.facts["subnet"], names)

    def published(self) -> dict[str, Any] | None:
        """The facts of the model that the branch holds; `None` if it holds none.

        Raises:
            UserError: it holds another model, and the arguments do not allow to replace it.
        """
        arguments, revision = self.arguments, self.arguments.revision or "main"
        try:
            names = {file.rfilename for file in self.api.repo_info(arguments.repo_id, revision=revision).siblings}
        except RepositoryNotFoundError:
            return None
        except RevisionNotFoundError:
            self.replaces = True  # a new branch begins with the files of main
            return None
        if FACTS_FILE in names:
            file = self.api.hf_hub_download(arguments.repo_id, FACTS_FILE, revision=revision)
            facts = json.loads(Path(file).read_text(encoding="utf-8"))
            if is_same_model(facts, self.facts):
                return facts
        elif names <= {".gitattributes", "README.md", "LICENSE"}:
            return None
        if not arguments.overwrite and not arguments.create_pr:
            raise UserError(
                f"{arguments.repo_id} ({revision}) holds another model: choose another --repo_id or --revision, open a"
                " pull request with --create_pr, or replace it with --overwrite"
            )
        return None

    def check_tag(self) -> None:
        """Refuses a tag that would have to move.

        Raises:
            UserError: the tag is there, on another commit than the newest.
        """
        arguments = self.arguments
        try:
            refs = self.api.list_repo_refs(arguments.repo_id)
        except RepositoryNotFoundError:
            return
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        if arguments.tag in tags and tags[arguments.tag] != heads.get(arguments.revision or "main"):
            raise UserError(
                f"the tag {arguments.tag} of {arguments.repo_id} is on an earlier commit, and tags do not move:"
                " choose another"
            )

    def write(self, folder: Path, published: dict[str, Any] | None) -> None:
        """Writes everything that is pushed. Weights that are published already keep the speed that was measured then:
        measured anew, no push would be like the one before.

        Raises:
            MissingExtraError: ONNX files are wanted, and the extra `onnx` is not installed.
            UserError: a stock HuBERT, or an ONNX file, cannot hold the subnet.
        """
        arguments, source = self.arguments, self.arguments.model_name_or_path
        exported, file = write_export(self.model, folder, arguments.format, getattr(torch, arguments.dtype))
        copy_processor(source, folder)
        if arguments.onnx:
            try:
                write_onnx_folder(self.model, folder)
            except UserError as error:
                raise UserError(f"{error}; --onnx false leaves the ONNX files out") from error
        with file.open("rb") as weights:
            self.facts["sha256"] = hashlib.file_digest(weights, "sha256").hexdigest()
        if published is not None and published.get("sha256") == self.facts["sha256"] and "speed" in published:
            self.facts["speed"] = published["speed"]
        else:
            largest = load_cut_lighthubert(source, None if self.space is None else "largest", dtype=torch.float32)
            speed = measured_speed(exported, torch_runner(largest), arguments.dtype, arguments.repeats)
            self.facts["speed"] = speed
        write_json(folder / FACTS_FILE, self.facts)
        card = render_subnet_card(
            self.facts,
            arguments.repo_id,
            self.license,
            arguments.training_data,
            dataset=arguments.results_dataset,
            language=arguments.language,
        )
        save_card(card, folder / "README.md")
        parent = Path(source) / "LICENSE"
        if parent.exists() or self.license == "apache-2.0":
            shutil.copy(parent if parent.exists() else APACHE_LICENSE, folder / "LICENSE")

    def push(self, folder: Path) -> str:
        """Makes the repository, the branch, one commit and the tag, as far as they are missing.

        Returns:
            The address of the commit or of the pull request.
        """
        arguments, api = self.arguments, self.api
        api.create_repo(arguments.repo_id, private=arguments.private or None, exist_ok=True)
        if self.replaces and arguments.overwrite:
            branch = arguments.revision or "main"
            print(f"{arguments.repo_id}: all other files on the branch {branch} are deleted", file=sys.stderr)
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
                raise UserError(f"{commit.commit_url} is pushed, but the tag {arguments.tag} is on an earlier commit")
            api.create_tag(arguments.repo_id, tag=arguments.tag, revision=commit.oid, exist_ok=True)
        return commit.pr_url or commit.commit_url


def publish(arguments: PushArguments) -> str:
    """Cuts a subnet out, writes it and pushes it.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        UserError: something that the arguments ask for is not possible; the message says what is.
        ConnectionError: the Hub cannot be reached, or refuses. The repository is at its last commit.
    """
    publication = Publication(arguments)
    failure = f"{arguments.repo_id} could not be pushed"
    remedy = "It is at its last commit: give the same command once more to go on"
    with reaching_hub(failure, remedy):
        published = publication.published()
        if arguments.tag:
            publication.check_tag()
    with tempfile.TemporaryDirectory() as folder:
        publication.write(Path(folder), published)
        with reaching_hub(failure, remedy):
            return publication.push(Path(folder))


def main() -> None:
    (arguments,) = parse_options(OptionParser(PushArguments, description=__doc__))
    logging.set_verbosity_error()
    print(publish(arguments))


if __name__ == "__main__":
    run(main)

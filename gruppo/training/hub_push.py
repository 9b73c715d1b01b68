"""Uploads an exported checkpoint to the Hugging Face hub, with its model card.

Everything goes through huggingface_hub's client, so its login applies: `hf auth login` or HF_TOKEN; private
repositories and other endpoints (HF_ENDPOINT) work as elsewhere. Access is checked before the export is written.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

from gruppo.errors import RunError, UsageError
from gruppo.runs.console import choose_progress
from gruppo.training.export import Export, plan_export
from gruppo.utils.hub import LOG_IN, hidden_bars, hub_problem, hub_reachable, unreachable
from gruppo.utils.progress import Progress

# Files that an earlier push can have left and that would be taken for a part of the new model.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]


@dataclass(frozen=True)
class Pushed:
    """A checkpoint on the hub. `url`: of its commit. `exported`: what was uploaded; the folder is kept only if it was
    given a name with `to`."""

    url: str
    repository: str
    private: bool
    exported: Export


def push_to_hub(
    run: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    to: str | Path | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> Pushed:
    """Export a checkpoint of the run in the folder `run`, and upload it to a model repository, "OWNER/NAME".

    The repository is created if there is none, as a private one with `private`. `revision`: a branch, which is created
    if there is none; "main" by default. `to`: also keep the folder. `options`: those of `gruppo.export`; with
    `verify`, nothing is uploaded if the verification fails. The weights in the repository are replaced (a GGUF file
    only by one of its name); its other files stay. Raises UsageError for mistakes, a missing login or missing rights,
    before the export is written, and RunError if the upload fails.
    """
    shown = choose_progress(progress)
    with tempfile.TemporaryDirectory(prefix="gruppo-push-") as scratch:
        plan = plan_export(run, Path(scratch) / "model" if to is None else to, **options)
        is_private = _open_repository(repository, private, revision)
        exported = plan.write(shown)
        message = f"{plan.recipe.run.name}: step {exported.step}, {plan.dtype}"
        with shown.bar(f"Uploading to {repository}", None, ""):
            try:
                url = upload_model(HfApi(), exported.path, repository, revision, message, replaces=not plan.gguf)
            except Exception as error:
                kept = "" if to is None else f"; the folder {to} is complete"
                raise _words(error, f"--push {repository}: the upload failed", RunError, kept) from error
    return Pushed(url, repository, is_private, exported)


def create_repository(api: HfApi, name: str, private: bool | None, revision: str | None) -> str:
    """Create a model repository and its branch where they are missing. Returns the full name, "OWNER/NAME".

    `private`: whether a new one is private; None for the owner's default. Raises errors of huggingface_hub.
    """
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    return repository


def upload_model(
    api: HfApi, folder: Path, repository: str, revision: str | None, message: str, replaces: bool = True
) -> str:
    """Replace the model in a repository by that in a folder; its other files stay. Returns the URL of the commit.

    `replaces`: False to add to the weights in the repository, which may hold GGUF files of several dtypes.
    Raises errors of huggingface_hub.
    """
    with hidden_bars():
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            delete_patterns=_REPLACED if replaces else None,
        )
    return commit.commit_url


def _open_repository(repository: str, private: bool, revision: str | None) -> bool:
    """Create the repository and the branch if they are missing. Returns whether the repository is private.

    Raises UsageError if the user may not write to it, or wants it private and it is public.
    """
    what = f"--push {repository}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UsageError(f"{what}: is no name of a repository; write OWNER/NAME, e.g. me/my-model")
    if get_token() is None:
        raise UsageError(f"{what}: there is no token of the Hugging Face hub; {LOG_IN}")
    if not hub_reachable():
        raise UsageError(f"{what}: {unreachable()}")
    api = HfApi()
    try:
        create_repository(api, repository, private or None, revision)
        api.auth_check(repository, write=True)
        is_private = bool(api.model_info(repository).private)
    except Exception as error:
        raise _words(error, what, UsageError) from error
    if private and not is_private:
        raise UsageError(
            f"--private: the repository {repository} exists and is public; make it private in its settings, leave "
            "--private out, or push to another name"
        )
    return is_private


def _words(error: Exception, what: str, kind: type[UsageError | RunError], then: str = "") -> Exception:
    """The error in words if it comes from the hub, otherwise itself."""
    problem = hub_problem(error)
    return error if problem is None else kind(f"{what}: {problem}{then}")

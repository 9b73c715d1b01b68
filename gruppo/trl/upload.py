"""Upload of a model folder to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from gruppo.errors import UsageError, error_line
from gruppo.trl.configs import TrainingArguments
from gruppo.utils.hub import hub_problem


def upload(folder: Path, args: TrainingArguments, message: str, options: Mapping[str, Any]) -> str:
    """Upload a folder as the repository that args name. Returns its address. `options`: revision and token.

    Raises UsageError if the hub cannot be reached or refuses.
    """
    name = args.hub_model_id or Path(args.output_dir or "model").absolute().name
    token = options.get("token") or args.hub_token
    revision = options.get("revision") or args.hub_revision
    api = HfApi(token=token)
    try:
        repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True)
        if revision:
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message, revision=revision)
    except Exception as error:  # of the hub, the network or the disk
        why = hub_problem(error) or error_line(error)
        raise UsageError(
            f"push_to_hub: {name} cannot be uploaded ({why}); log in with `hf auth login`, check the connection and "
            "hub_model_id, and call trainer.push_to_hub() again"
        ) from error
    return str(repository)

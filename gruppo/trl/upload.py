"""Upload of a model folder to the repository that the arguments of a TRL trainer name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from gruppo.errors import UsageError, error_line
from gruppo.training.hub_push import create_repository, upload_model
from gruppo.trl.configs import TrainingArguments
from gruppo.utils.hub import hub_problem


def upload(folder: Path, args: TrainingArguments, message: str, options: Mapping[str, Any]) -> str:
    """Replace the model in the repository that args name by that in a folder. Returns the URL of the commit.

    `options`: revision and token. Raises UsageError if the hub cannot be reached or refuses.
    """
    name = args.hub_model_id or Path(args.output_dir or "model").absolute().name
    token = options.get("token") or args.hub_token
    revision = options.get("revision") or args.hub_revision
    api = HfApi(token=token)
    try:
        repository = create_repository(api, name, args.hub_private_repo, revision or None)
        return upload_model(api, folder, repository, revision or None, message)
    except Exception as error:  # of the hub, the network or the disk
        why = hub_problem(error) or error_line(error)
        raise UsageError(
            f"push_to_hub: {name} cannot be uploaded ({why}). The run folder keeps the model; once this "
            "is fixed, call trainer.push_to_hub() again"
        ) from error

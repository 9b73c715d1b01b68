"""The run folders in a script's output_dir: gruppo, gruppo-2, …"""

from __future__ import annotations

from pathlib import Path

from gruppo.errors import UsageError
from gruppo.trl.configs import TrainingArguments

FOLDER = "gruppo"


def resumes(args: TrainingArguments, resume: str | bool | None) -> bool:
    """Whether to continue the last run. `resume`: True, a checkpoint in output_dir, or None for what the args say.

    Raises UsageError for a checkpoint that is not in output_dir.
    """
    resume = args.resume_from_checkpoint if resume is None else resume
    if isinstance(resume, str) and resume.lower() in ("true", "false", ""):
        return resume.lower() == "true"
    if not isinstance(resume, str):
        return bool(resume)
    checkpoint = Path(resume).resolve()
    if Path(args.output_dir or "").resolve() not in [checkpoint, *checkpoint.parents]:
        raise UsageError(
            f"resume_from_checkpoint = {resume!r}: is not in output_dir = {args.output_dir!r}; a run continues where "
            "it was: write resume_from_checkpoint=True, and output_dir as in that run"
        )
    return True


def run_folder(args: TrainingArguments, resume: bool) -> Path:
    """The last run folder that exists if a run continues, else the first that does not."""
    parent = Path(args.output_dir or ".")
    number = 1
    while (parent / _name(number)).exists():
        number += 1
    return parent / _name(number - 1 if resume and number > 1 else number)


def _name(number: int) -> str:
    return FOLDER if number == 1 else f"{FOLDER}-{number}"

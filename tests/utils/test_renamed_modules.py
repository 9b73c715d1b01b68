"""Import paths of revision 790d39a keep working, with a warning that names the new ones."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from gruppo.config.loading import load_recipe
from gruppo.utils.renamed_modules import MODULES, NAMES, advice
from tests.small_runs import recipe


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_gives_the_new_objects(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} has moved to {MODULES[old][0]}"):
        module = importlib.import_module(old)
    new = importlib.import_module(MODULES[old][0])
    names = [name for name, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__]
    for name in names:
        assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_name_of_an_old_module_can_be_imported() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from gruppo.maths.losses import pair_loss, policy_loss\n"
        "from gruppo.rewards.adapters import verl\n"
        "from gruppo.algorithms.losses import dpo_loss\n"
        "assert pair_loss is dpo_loss"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_advice_names_the_new_path() -> None:
    assert advice("gruppo.rewards.rules:choice").startswith(  # type: ignore[union-attr]
        "gruppo.rewards.rules:choice has moved to gruppo.rewards.answers:choice"
    )
    assert advice("gruppo.rewards.answers:choice") is None
    assert advice("mine.rewards:choice") is None


def test_renamed_objects_exist() -> None:
    names = {name for targets in MODULES.values() for new in targets for name in vars(importlib.import_module(new))}
    assert set(NAMES.values()) <= names


def test_a_recipe_may_name_an_old_module(tiny_folder: str) -> None:
    """It loads, and a warning says what to write."""
    data = recipe(tiny_folder, reward__functions=["gruppo.rewards.rules:choice"])
    with pytest.warns(FutureWarning, match="reward.functions.*gruppo.rewards.answers:choice"):
        loaded = load_recipe(data)
    assert loaded.reward.functions == ["gruppo.rewards.rules:choice"]

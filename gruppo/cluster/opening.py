"""From a recipe to ranks that this process leads, and starts itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from gruppo.actors.needs import check_ray
from gruppo.cluster.torchrun import is_launched
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.models.loading import find_model
from gruppo.models.lora import skeleton
from gruppo.models.precision import choose_device, choose_dtype
from gruppo.utils.progress import Progress

if TYPE_CHECKING:
    from gruppo.cluster.started import StartedRanks


def start_ranks(recipe: Recipe, model: PreTrainedModel | None, progress: Progress, stack: ExitStack) -> StartedRanks:
    """What starts the ranks of a recipe with several trainers. `model`: in place of the recipe's. `stack` ends Ray, if
    it was started here.

    Raises UsageError if this process may not start ranks, or cannot; RunError if Ray does not start.
    """
    assert recipe.cluster is not None
    size = recipe.cluster.trainers
    command = f"`torchrun --nproc-per-node {size} --no-python gruppo train RECIPE`"
    if is_launched():
        raise UsageError(
            f"cluster.trainers = {size}: a launcher has started this process as one of several (WORLD_SIZE), and "
            f"gruppo.train starts the ranks itself; start the script once, without a launcher, or run {command}"
        )
    device = choose_device(recipe.model.device)
    check_ray(
        recipe.cluster, device, f"cluster.trainers = {size}", f"start the ranks with {command}", followers=size - 1
    )
    from gruppo.cluster.started import StartedRanks

    ranks = StartedRanks(recipe, _weight_bytes(recipe, model, progress), progress)
    stack.callback(ranks.close)
    return ranks


def _weight_bytes(recipe: Recipe, model: PreTrainedModel | None, progress: Progress) -> int:
    """Bytes of one version of the weights as engines get it; 0 without engines."""
    if recipe.cluster is None or not recipe.cluster.engines:
        return 0
    if model is None:
        model = skeleton(find_model(recipe.model.name, progress).config)
    dtype = choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize

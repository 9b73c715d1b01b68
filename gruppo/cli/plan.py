"""`gruppo plan`: a prediction for devices that need not be there."""

from __future__ import annotations

from typing import Annotated

import typer

from gruppo.cli.options import Overrides, RecipeFile, load_chosen_recipe

Assumed = Annotated[float | None, typer.Option(help="An assumption; the output explains it.", show_default=False)]


def plan(
    recipe: RecipeFile,
    devices: Annotated[
        str,
        typer.Option(help="NUMBERxDEVICE, or MACHINESxNUMBERxDEVICE: 8xH100, 4x8xH200. docs/plan.md lists devices."),
    ],
    set_: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, in seconds, bytes and tokens.")
    ] = False,
    parameters: Annotated[
        float | None, typer.Option(help="Number of weights, e.g. 7.6e9, in place of the model's config.")
    ] = None,
    active_parameters: Annotated[
        float | None, typer.Option(help="Weights per token of a mixture of experts; with --parameters.")
    ] = None,
    mfu: Assumed = None,
    moe_mfu: Assumed = None,
    bandwidth_share: Assumed = None,
    iteration_ms: Assumed = None,
    reduce_us: Assumed = None,
    engine_memory: Assumed = None,
    slots: Assumed = None,
    mean_share: Assumed = None,
    mean_tokens: Assumed = None,
    prompt_tokens: Assumed = None,
    spread: Assumed = None,
    longest_share: Assumed = None,
    micro_batch_tokens: Assumed = None,
    transfer_gb_s: Assumed = None,
    network_gb_s: Assumed = None,
    other_share: Assumed = None,
) -> None:
    """Predict step time, memory and the split of devices from published figures.

    Nothing is loaded but the recipe and the model's config.json. Exit code 0 if the recipe fits, 1 if it does not.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from dataclasses import fields

    from gruppo.errors import UsageError
    from gruppo.planning.assumptions import Assumptions
    from gruppo.planning.describe import describe_plan
    from gruppo.planning.devices import read_cluster
    from gruppo.planning.plan import make_plan
    from gruppo.planning.shape import model_shape, typical_shape
    from gruppo.utils.progress import visible

    cluster = read_cluster(devices)
    assumptions = Assumptions(**{each.name: given[each.name] for each in fields(Assumptions) if each.name in given})
    settings = load_chosen_recipe(recipe, set_, trusted=True)  # no code that it names is run
    if parameters is not None:
        shape = typical_shape(parameters, active_parameters)
    elif active_parameters is not None:
        raise UsageError(f"--active-parameters {active_parameters:g}: needs --parameters, the number of all weights")
    else:
        shape = model_shape(settings.model.name)
    result = make_plan(settings, shape, cluster, assumptions)
    if as_json:
        import json

        typer.echo(json.dumps(result.as_dict()))
    else:
        typer.echo(visible(describe_plan(result)))
    if result.problems:
        raise typer.Exit(1)

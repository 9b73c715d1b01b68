"""The API does what its description says, for whatever is asked: schemathesis tries it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import sampled_from
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import unsupported_method

from gruppo.ui.app import create_app
from gruppo.ui.catalog import run_key
from tests.ui.attacks import ATTACKS, write_run
from tests.ui.conftest import Runs
from tests.ui.visits import HOST, Visitor

EXAMPLES = 12  # of each operation
STREAMS = r"/live$"  # server-sent events, which do not end


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    """The description of the API, as the server gives it, over a hostile run."""
    root = tmp_path_factory.mktemp("api")
    write_run(root / "runs/one", ATTACKS[:8])
    app = create_app(root / "runs", cache=root / "cache")
    return schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={"host": HOST}).exclude(path_regex=STREAMS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_as_described(mode: GenerationMode, api: schemathesis.BaseSchema) -> None:
    """No error of the server; statuses, types and contents of answers are in the description."""
    limits = settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    tried = set()
    for result in api.get_all_operations():
        operation = result.ok()

        @limits
        @given(operation.as_strategy(generation_mode=mode), sampled_from([None, 0, 1, 2]))
        def answers(case: schemathesis.Case, step: int | None) -> None:
            tried.add(case.path)
            if mode == GenerationMode.POSITIVE and step is not None and case.path_parameters:
                known = {"key": run_key("one"), "step": step, "group": step, "name": "recipe.toml"}
                case.path_parameters = {name: known[name] for name in case.path_parameters}
            case.call_and_validate(base_url=f"http://{HOST}", excluded_checks=[unsupported_method])

        with suppress(Unsatisfiable):  # an address without parameters cannot be wrong
            answers()
    assert len(tried) >= (10 if mode == GenerationMode.NEGATIVE else 19)


def test_every_address_is_described(visitor: Visitor) -> None:
    paths = visitor.get("/api/openapi.json").json()["paths"]
    assert {path for path in paths if path.startswith("/api/")} == {
        "/api/runs", "/api/compare", "/api/r/{key}/series", "/api/r/{key}/live", "/api/r/{key}/index",
        "/api/r/{key}/steps/{step}/groups/{group}",
    }  # fmt: skip
    assert all(set(operations) == {"get"} for operations in paths.values())


def test_the_list_of_runs(runs: Runs, visitor: Visitor) -> None:
    listed = {run["key"]: run for run in visitor.get("/api/runs").json()}
    assert listed.keys() == {runs.key(name) for name in runs.paths}
    run = listed[runs.key("seed-0")]
    assert (run["name"], run["state"], run["step"], run["steps"]) == ("tiny-0", "done", 4, 4)
    assert Path(run["folder"]) == Path("seed-0")

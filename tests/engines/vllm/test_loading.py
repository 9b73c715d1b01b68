"""Weights in vLLM: the probe finds loads that went wrong, adapters are merged, and its processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gruppo.config.sections import Lora
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.engines.probe import ProbedEngine, probe
from gruppo.engines.vllm.engine import VllmEngine
from gruppo.errors import RunError
from gruppo.models.lora import adapted_layers, add_adapters
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import WeightSource, save_model
from tests.engines.test_contract import make_policy
from tests.engines.vllm.conftest import Start

REQUESTS = [Request((5, 6, 7), [(0, index) for index in range(4)])]


def tokens(groups: list[list[Any]]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in groups for completion in group]


def reload_from(folder: Path, policy: LanguageModel) -> Callable[[VllmEngine], None]:
    """vLLM's own way to reload weights, from a folder with the right ones."""
    save_model(policy, folder)

    def load(engine: VllmEngine) -> None:
        engine._llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        engine._llm.reset_prefix_cache()

    return load


@pytest.fixture
def engine(start: Start, policy: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    """An engine whose methods may be replaced: later tests get the original ones."""
    built = start(policy)
    monkeypatch.setattr(built, "load_weights", built.load_weights)
    return built


def test_the_probe_finds_vllms_reload_of_weights(engine: VllmEngine, tmp_path: Path) -> None:
    """In vLLM's CPU build it succeeds and leaves garbage. If this fails, vLLM has fixed it: use it in place of ours."""
    policy = make_policy(seed=7)
    reload, load = reload_from(tmp_path, policy), engine.load_weights
    engine.load_weights = lambda source, version: reload(engine)  # type: ignore[method-assign]
    wrapped = ProbedEngine(engine, policy, "vllm")
    with pytest.raises(RunError, match='engine "vllm" does not have the weights of version 3: after 2 loads'):
        wrapped.load_weights(policy.weight_source(), 3)
    engine.load_weights = load  # type: ignore[method-assign]
    wrapped.load_weights(policy.weight_source(), 3)
    assert tokens(wrapped.generate(REQUESTS, SamplingParams(0.0, 12))) == tokens(
        NativeEngine(policy, 4).generate(REQUESTS, SamplingParams(0.0, 12))
    )


def test_the_probe_finds_a_prefix_cache_of_old_weights(
    engine: VllmEngine, policy: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_policy(seed=8)
    ProbedEngine(engine, policy, "vllm").load_weights(policy.weight_source(), 1)
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    with pytest.raises(RunError, match="version 2"):
        ProbedEngine(engine, other, "vllm").load_weights(other.weight_source(), 2)
    monkeypatch.undo()
    ProbedEngine(engine, other, "vllm").load_weights(other.weight_source(), 2)


def test_versions_back_and_forth(start: Start, policy: LanguageModel) -> None:
    """Every load replaces everything, and the first weights give the first completions again."""
    other = make_policy(seed=9)
    engine = start(policy)
    first = tokens(engine.generate(REQUESTS, SamplingParams(1.0, 12)))
    for version in range(1, 4):
        engine.load_weights(other.weight_source(), version)
        assert probe(engine, other) < 1e-5 < probe(engine, policy)
        engine.load_weights(policy.weight_source(), version)
        assert probe(engine, policy) < 1e-5 < probe(engine, other)
    assert tokens(engine.generate(REQUESTS, SamplingParams(1.0, 12))) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights | {"extra": torch.zeros(1)}, "failed while loading weights .*'extra'"),
        (lambda weights: dict(list(weights.items())[:-1]), "weights of 'model.norm.weight': missing"),
    ],
    ids=["unknown", "missing"],
)
def test_weights_of_another_architecture_are_refused(
    start: Start, policy: LanguageModel, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    engine = start(policy)
    source = WeightSource(policy.model, lambda: iter(change(policy.weights()).items()))
    with pytest.raises(RunError, match=message) as caught:
        engine.load_weights(source, 1)
    assert len(str(caught.value)) < 700
    engine.load_weights(policy.weight_source(), 2)
    assert probe(engine, policy) < 1e-5


def test_adapters_give_the_numbers_of_the_trainer(start: Start, policy: LanguageModel) -> None:
    """They are merged as they are sent. The native engine with the same adapters samples the same."""
    adapted = add_adapters(make_policy(), Lora(rank=4), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(adapted.model).values():
            layer.lora_B["default"].weight.normal_(0, 0.3)
    adapted.generation.advance()
    engine = start(adapted)
    assert probe(engine, adapted) < 1e-5
    assert probe(engine, policy) > 0.1, "without the adapters"
    greedy = SamplingParams(0.0, 12)
    assert tokens(engine.generate(REQUESTS, greedy)) == tokens(NativeEngine(adapted, 4).generate(REQUESTS, greedy))


def test_a_call_that_is_left_early_leaves_nothing_behind(start: Start, policy: LanguageModel) -> None:
    engine = start(policy)
    expected = tokens(engine.generate(REQUESTS, SamplingParams(1.0, 8)))
    stream = engine.stream([Request((5,), [(1,)], [1]), Request((6,), [(2,), (3,)])], SamplingParams(1.0, 60))
    assert next(stream)[0] == 0
    stream.close()  # type: ignore[attr-defined]
    assert not engine._llm.llm_engine.has_unfinished_requests()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUESTS, SamplingParams(1.0, 60), interrupt)
    assert tokens(engine.generate(REQUESTS, SamplingParams(1.0, 8))) == expected


def test_weights_that_give_no_number_are_an_error(start: Start, policy: LanguageModel) -> None:
    engine = start(policy)
    weights = {name: tensor * torch.nan for name, tensor in policy.weights().items()}
    engine.load_weights(WeightSource(policy.model, lambda: iter(weights.items())), 1)
    assert probe(engine, policy) == float("inf")
    with pytest.raises(RunError, match="log-probabilities of the model are not finite"):
        engine.generate(REQUESTS, SamplingParams(1.0, 4))


PROGRAM = """
import sys
from gruppo.config.engine_section import Engine
from gruppo.engines import build_engine
from gruppo.engines.base import SamplingParams
from gruppo.utils.signals import stop_on_signals
from tests.engines.vllm.test_loading import REQUESTS, make_policy

def main():
    policy = make_policy()
    engine = build_engine(policy, 4, settings=Engine(name="vllm"), length=128)
    with stop_on_signals() as stop:
        print("ready", flush=True)
        while not stop.requested:
            engine.generate(REQUESTS, SamplingParams(1.0, 4))
        engine.generate(REQUESTS, SamplingParams(1.0, 4))
        print("sampled after the signal", flush=True)
        sys.stdin.read()

if __name__ == "__main__":
    main()
"""


def test_ctrl_c_leaves_vllm_alive_and_a_killed_trainer_ends_it(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group of processes: the run ends at a safe point, and may sample until then."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as trainer:  # fmt: skip
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        children = psutil.Process(trainer.pid).children(recursive=True)
        assert any("VLLM" in child.name() or "VLLM" in " ".join(child.cmdline()) for child in children)
        os.killpg(trainer.pid, signal.SIGINT)
        assert trainer.stdout.readline() == "sampled after the signal\n"
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "vLLM outlives its trainer"
        time.sleep(0.2)


def test_a_process_that_dies_is_an_error_with_the_way_out(policy: LanguageModel) -> None:
    from gruppo.config.engine_section import Engine as EngineTable

    engine = VllmEngine(policy, 4, policy.context, EngineTable(name="vllm"))
    engine.load_weights(policy.weight_source(), 0)
    (core,) = (child for child in psutil.Process().children() if _is_core_of(child, engine))
    for process in [*core.children(recursive=True), core]:
        process.kill()
    with pytest.raises(RunError, match=r'engine.name = "vllm": vLLM failed while sampling .* resume the run'):
        engine.generate(REQUESTS, SamplingParams(1.0, 60))
    engine.close()


def _is_core_of(child: psutil.Process, engine: VllmEngine) -> bool:
    manager = engine._llm.llm_engine.engine_core.resources.engine_manager
    return child.pid in {process.pid for process in manager.processes}

"""An exported checkpoint is a transformers model with the same weights and answers, and a model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import gruppo
from gruppo.engines.base import Request, SamplingParams
from gruppo.engines.native.engine import NativeEngine
from gruppo.errors import UsageError
from gruppo.models.loading import find_model, load_model
from gruppo.runs.results import Result
from gruppo.training.api import train
from gruppo.training.checkpoint import load_state
from gruppo.training.export import Export, export
from gruppo.training.model_card import model_card
from gruppo.training.run import TrainingRun
from gruppo.utils.files import file_sha256
from tests.conftest import END, make_policy, make_tokenizer
from tests.small_runs import ROWS, recipe, small_run

PROMPTS = [[1, 2], [5], [8, 9, 10, 3]]


@pytest.fixture(scope="module")
def finished(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run whose initial model has two end-of-turn tokens, evaluated after every second step."""
    path = tmp_path_factory.mktemp("data") / "held out.jsonl"
    path.write_text("".join(json.dumps({"prompt": letter, "answer": letter}) + "\n" for letter in "abc"))
    model = tmp_path_factory.mktemp("models") / "two-ends"
    shutil.copytree(tiny_folder, model)
    GenerationConfig(eos_token_id=[END, 7], pad_token_id=END, do_sample=True, temperature=0.3).save_pretrained(model)
    changes = {"evaluation__task": str(path), "evaluation__grader": "exact_match", "evaluation__every": 2}
    return small_run(str(model), tmp_path_factory.mktemp("run") / "tiny", **changes)


@pytest.fixture(scope="module")
def exported(finished: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished.path, tmp_path_factory.mktemp("export") / "tiny").path


ALONE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
for folder in sys.argv[2:]:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    generated = []
    for prompt in json.loads(sys.argv[1]):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):].tolist()
        generated.append(ids)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True
    )
    print(json.dumps({"ids": generated, "text": said, "gruppo": "gruppo" in sys.modules}))
"""


@pytest.fixture(scope="module")
def parts(finished: Result, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An export in several files."""
    return export(finished.path, tmp_path_factory.mktemp("export") / "parts", max_shard_size="20KB")


@pytest.fixture(scope="module")
def answers(exported: Path, parts: Export) -> dict[Path, dict[str, Any]]:
    """The answers of plain transformers, in a separate process, to both folders."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, json.dumps(PROMPTS), str(exported), str(parts.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "UserWarning" not in done.stderr
    return dict(zip((exported, parts.path), map(json.loads, done.stdout.splitlines()), strict=True))


def test_plain_transformers_gives_the_greedy_answers_of_the_engine(
    finished: Result, exported: Path, answers: dict[Path, dict[str, Any]]
) -> None:
    policy = load_model(find_model(str(finished.path / "model")), "cpu", "float32")
    requests = [Request(tuple(prompt), [(0,)]) for prompt in PROMPTS]
    groups = NativeEngine(policy, 4).generate(requests, SamplingParams(0.0, 12))
    result = answers[exported]
    assert result["ids"] == [list(group[0].token_ids) for group in groups]
    assert result["text"] == "<ab>="
    assert result["gruppo"] is False


def test_folder_is_complete(finished: Result, exported: Path) -> None:
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "README.md"} <= {path.name for path in exported.iterdir()}  # fmt: skip
    assert list(exported.parent.iterdir()) == [exported], "no leavings"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.iterdir()), "others may read it"
    generation = GenerationConfig.from_pretrained(exported)
    assert generation.eos_token_id == [END, 7]
    assert not generation.do_sample, "the run's evaluations were greedy"
    weights, run = load_file(exported / "model.safetensors"), load_file(finished.path / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], run[name]) for name in weights)
    assert weights.keys() == run.keys(), "the tied head is written once"


def test_start_model_and_network_are_not_needed(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "start")
    small_run(str(tmp_path / "start"), tmp_path / "run", run__steps=1)
    shutil.rmtree(tmp_path / "start")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert export(tmp_path / "moved", tmp_path / "out").step == 1


def test_untied_head_is_written_and_read(tmp_path: Path) -> None:
    model = make_policy(tie_word_embeddings=False).model
    train({**recipe("x", run__steps=1)}, prompts=ROWS, model=model, tokenizer=make_tokenizer(), out=tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    trained = load_file(tmp_path / "run" / "checkpoints" / "step-000001" / "weights.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, trained["lm_head.weight"])
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_bfloat16(finished: Result, exported: Path, tmp_path: Path) -> None:
    export(finished.path, tmp_path / "half", dtype="bfloat16")
    wide, half = load_file(exported / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in wide.items())
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_large_models_are_written_in_several_files(
    exported: Path, parts: Export, answers: dict[Path, dict[str, Any]]
) -> None:
    shards = sorted(parts.path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 25_000 for path in shards)
    assert (parts.path / "model.safetensors.index.json").is_file()
    assert parts.files == len(list(parts.path.iterdir()))
    assert answers[parts.path] == answers[exported]


def with_accuracies(run: Path, to: Path, accuracies: dict[int, float]) -> Path:
    """A copy of a run with these accuracies; hashes are updated."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        figures = state["evaluations"]["0"]
        state["evaluations"] = {str(step): {**figures, "accuracy": value} for step, value in accuracies.items()}
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["state.json"] = file_sha256(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_best_last_and_a_step(finished: Result, tmp_path: Path) -> None:
    run = with_accuracies(finished.path, tmp_path / "run", {0: 0.9, 2: 0.8, 4: 0.5, 6: 0.3})
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-2:] == ["step-000004", "step-000006"]
    best = export(run, tmp_path / "best", checkpoint="best")
    last = export(run, tmp_path / "last")
    kept = min(step for step in (2, 4) if (run / "checkpoints" / f"step-{step:06d}").is_dir())
    assert (best.step, last.step) == (kept, 6)
    assert last.accuracy == 0.3
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "last"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert export(run, tmp_path / "four", checkpoint="4").step == export(run, tmp_path / "4", checkpoint=4).step == 4
    weights = load_file(run / "checkpoints" / "step-000004" / "weights.safetensors")
    four = load_file(tmp_path / "four" / "model.safetensors")
    assert all(torch.equal(weights[name], four[name]) for name in weights)


def test_card(finished: Result, exported: Path, tmp_path: Path) -> None:
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert {"grpo", "gruppo"} <= set(front["tags"])
    assert "base_model" not in front, "the initial model was a folder"
    low, high = finished.summary["interval_after"]
    for words in (
        f"{finished.summary['accuracy_before']:.1%}",
        f"{finished.summary['accuracy_after']:.1%} (95% interval {low:.1%} to {high:.1%}, 3 questions)",
        "DeepSeekMath (2402.03300) Eq. 3",
        "kl_coef = 0.02",
        "4 questions × 4 completions of at most 8 tokens",
        "`tests/rewards/functions.py:likes_letters` (weight 1)",
        "18 rows",
        "`held out.jsonl`, graded by `exact_match`",
        "seed",
        f"transformers {json.loads((finished.path / 'environment.json').read_text())['packages']['transformers']}",
        "AutoModelForCausalLM.from_pretrained",
        "apply_chat_template",
    ):
        assert words in text
    assert "(/" not in text
    assert not re.search(r"[\"' `]/\w+/", text), "no path of this machine"
    assert "gruppo.train(" in text, "the questions came from Python"
    recipe_text = text.split("```toml\n")[1].split("```")[0]
    assert gruppo.load_recipe(tomllib.loads(recipe_text)).sampling.group_size == 4


def test_lines_of_the_card_load_the_model(exported: Path) -> None:
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("this folder", str(exported)).replace("What is 3 + 4?", "abc").replace("64", "6")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<abc>=")


def test_card_of_hub_models_and_data_names_them(finished: Result, tmp_path: Path) -> None:
    data = recipe("someone/model-1B", method__name="dapo") | {
        "task": {"name": "openai/gsm8k", "system": "/no_think a/b"}
    }
    state = load_state(sorted((finished.path / "checkpoints").iterdir())[-1])
    environment = json.loads((finished.path / "environment.json").read_text())
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# The initial model\n")
    text = str(model_card(gruppo.load_recipe(data), state, environment, "float32", False, start_model=tmp_path))
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "someone/model-1B"
    assert front["datasets"] == ["openai/gsm8k"]
    assert front["license"] == "mit"
    assert "dapo" in front["tags"]
    assert "`gruppo train recipe.toml`" in text
    assert "/no_think a/b" in text
    assert "apply_chat_template" not in text


def test_sampled_evaluations_make_a_sampling_generation_config(tiny_folder: str, tmp_path: Path) -> None:
    small_run(tiny_folder, tmp_path / "run", run__steps=1)
    text = (tmp_path / "run" / "recipe.toml").read_text()
    (tmp_path / "run" / "recipe.toml").write_text(text + "\n[evaluation.decoding]\ntemperature = 0.7\ntop_p = 0.9\n")
    export(tmp_path / "run", tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.7, 0.9)


def test_a_model_passed_from_python_is_trained_as_a_copy_and_exported(tmp_path: Path) -> None:
    model = make_policy(initializer_range=0.02).model.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = recipe("x", run__steps=2)
    del data["model"]["name"]
    arguments = {"model": model, "tokenizer": make_tokenizer(), "prompts": ROWS, "out": tmp_path / "run"}
    result = train(data, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.bfloat16
    assert 'name = "in-memory:LlamaForCausalLM"' in (tmp_path / "run" / "recipe.toml").read_text()
    trained = result.load_model()
    assert trained.dtype == torch.float32
    assert not torch.equal(trained.lm_head.weight, before["lm_head.weight"].float())
    again = train(data, **arguments, resume=True)
    assert again.summary["weights_sha256"] == result.summary["weights_sha256"]
    export(tmp_path / "run", tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, trained.lm_head.weight)
    assert "with the model, the prompts" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UsageError, match="not those that this run started with"):
        train(data, **{**arguments, "model": make_policy(seed=1).model}, resume=True)
    with pytest.raises(UsageError, match="was passed from Python; pass it again"):
        train({**data, "model": {"name": "in-memory:LlamaForCausalLM", "device": "cpu", "dtype": "float32"}},
              prompts=ROWS, out=tmp_path / "run", resume=True)  # fmt: skip


def test_a_model_passed_from_python_trains_like_the_same_model_from_its_folder(
    tiny_folder: str, tmp_path: Path
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    model.requires_grad_(False)
    data = recipe(tiny_folder, run__steps=2)
    one = train(data, prompts=ROWS, model=model, tokenizer=tokenizer, out=tmp_path / "one")
    two = train(data, prompts=ROWS, out=tmp_path / "two")
    assert one.summary["weights_sha256"] == two.summary["weights_sha256"]


def test_evaluate_accepts_a_model_passed_from_python(tiny_folder: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    options = {"grader": "exact_match", "max_tokens": 5, "dtype": "float32"}
    one = gruppo.evaluate(model, str(tmp_path / "rows.jsonl"), tokenizer=tokenizer, **options)
    two = gruppo.evaluate(tiny_folder, str(tmp_path / "rows.jsonl"), **options)
    assert one.rows() == two.rows()


@pytest.mark.parametrize(
    ("factories", "word"),
    [
        ({"model": lambda: make_policy().model}, "tokenizer: missing"),
        ({"model": lambda: make_policy().model, "tokenizer": lambda: "gpt2"}, "tokenizer: a str"),
        ({"model": lambda: "gpt2", "tokenizer": make_tokenizer}, "write it as model.name"),
        ({"model": lambda: make_policy().model.model, "tokenizer": make_tokenizer}, "model: is a LlamaModel"),
        ({"tokenizer": make_tokenizer}, "needs a model passed from Python"),
    ],
)
def test_invalid_models_passed_from_python_are_refused(factories: dict[str, Any], word: str, tmp_path: Path) -> None:
    arguments = {name: make() for name, make in factories.items()}
    with pytest.raises(UsageError, match=word):
        train(recipe("x"), prompts=ROWS, out=tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_interrupted_run_exports_its_last_checkpoint(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingRun.finish_step

    def step(self, *arguments):
        original(self, *arguments)
        if self.state.step == 3:
            self.stop.request()

    monkeypatch.setattr(TrainingRun, "finish_step", step)
    assert small_run(tiny_folder, tmp_path / "run").summary["state"] == "interrupted"
    assert export(tmp_path / "run", tmp_path / "out").step == 3
    with pytest.raises(UsageError, match="not evaluated two steps"):
        export(tmp_path / "run", tmp_path / "best", checkpoint="best")


def test_stopped_run_exports_its_last_checkpoint(tiny_folder: str, tmp_path: Path) -> None:
    def end(step: int, *_: object) -> object:
        return gruppo.STOP if step == 3 else None

    train(recipe(tiny_folder), prompts=ROWS, out=tmp_path / "run", callbacks=[end])
    exported = gruppo.export(tmp_path / "run", tmp_path / "out")
    assert (exported.step, exported.accuracy) == (3, None)
    weights, run = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "run/model"))
    assert all(torch.equal(weights[name], run[name]) for name in run)


def test_mistakes_are_reported_with_a_fix_and_leave_no_files(finished: Result, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "nothing").mkdir()
    shutil.copytree(finished.path, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    shutil.copytree(finished.path, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "base")
    for run, to, options, word in (
        (finished.path, "full", {}, "already exists; give the name of a new folder"),
        (tmp_path / "nothing", "out", {}, "contains no run"),
        (tmp_path / "none", "out", {}, "contains no run"),
        (tmp_path / "bare", "out", {}, "no checkpoint yet"),
        (tmp_path / "old", "out", {}, r"base/ \(config and tokenizer\) is missing"),
        (finished.path, "out", {"checkpoint": "5"}, "the steps with a checkpoint are"),
        (finished.path, "out", {"checkpoint": "newest"}, "write last, best, or"),
        (finished.path, "out", {"dtype": "float16"}, "write float32 or bfloat16"),
        (finished.path, "out", {"max_shard_size": "big"}, "write e.g. 5GB"),
        (finished.path, "full/file/x", {}, "cannot be written"),
    ):
        with pytest.raises(UsageError, match=word):
            export(run, tmp_path / to, **options)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "full", "nothing", "old"]


def test_damaged_checkpoint_is_named(finished: Result, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000006" / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match=r"step-000006: the checkpoint is damaged .*checkpoint are .*4$"):
        export(tmp_path / "run", tmp_path / "out")
    assert export(tmp_path / "run", tmp_path / "out", checkpoint=4).step == 4


def test_an_empty_folder_is_accepted_and_tensors_have_the_format_metadata(finished: Result, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(finished.path, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}

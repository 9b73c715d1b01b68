"""`gruppo label` and `gruppo reward-model`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from typer.testing import CliRunner

from gruppo import label, train, train_reward_model
from gruppo.cli.main import app
from gruppo.config.loading import without_unused_fields
from gruppo.errors import UsageError
from gruppo.models.weights import save_model
from gruppo.runs.reading import read_lines
from gruppo.utils.signals import Interrupted
from tests.conftest import make_policy
from tests.small_runs import ROWS, at_call, killed, recipe

VOWELS = "tests/rewards/functions.py:ends_in_a_vowel"
EVERY_TWO = "tests/functions_of_users.py:every_two"


@pytest.fixture(scope="module")
def settings(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = recipe(tiny_folder, reward__functions=[VOWELS], task__name=str(rows))
    made["reward_model"] = {
        "kind": "process", "prompts": 10, "split": EVERY_TWO, "continuations": 3, "batch_size": 4, "epochs": 2,
        "learning_rate": 1e-3, "held_out": 0.3,
    }  # fmt: skip
    made["method"]["name"] = "grpo-process"
    return made


@pytest.fixture(scope="module")
def labelled(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labelled") / "labels"
    label(settings, out=out)
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "labels").glob("step-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_one_row_per_completion_with_its_steps(settings: dict[str, Any], labelled: Path) -> None:
    rows = rows_of(labelled)
    assert len(rows) == 40
    assert len(list((labelled / "labels").iterdir())) == 3, "4 questions a file"
    for row in rows:
        assert row["right"] == (row["text"][-1:] in set("aeiou"))
        assert len(row["step_ends"]) == len(row["soft"]) == len(row["hard"]) == len(row["step_texts"])
        assert "".join(row["step_texts"]) == row["text"][: sum(map(len, row["step_texts"]))]
        assert set(row["soft"]) <= {0.0, 1 / 3, 2 / 3, 1.0}
    assert any(0 < share < 1 for row in rows for share in row["soft"])


def test_labelling_resumes_and_keeps_existing_files(
    settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(monkeypatch, "gruppo.rollout.step_labels.StepLabeller.label", 2):
        label(settings, out=tmp_path / "labels")
    first = tmp_path / "labels/labels/step-000001.parquet"
    written = first.stat().st_mtime_ns
    with pytest.raises(UsageError, match="resume=True"):
        label(settings, out=tmp_path / "labels")
    label(settings, out=tmp_path / "labels", resume=True)
    assert first.stat().st_mtime_ns == written
    assert rows_of(tmp_path / "labels") == rows_of(labelled)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_a_reward_model_is_trained_on_labels_and_resumes(
    kind: str, settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**settings, "reward_model": {**settings["reward_model"], "kind": kind}}
    if kind == "outcome":
        own["method"] = {"name": "grpo"}
    own = without_unused_fields(own)
    whole = train_reward_model(own, labelled, out=tmp_path / "whole")
    lines = read_lines(tmp_path / "whole/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, whole.updates + 1))
    assert whole.before["labels"] == whole.after["labels"] > 0
    auto = AutoModelForSequenceClassification if kind == "outcome" else AutoModelForTokenClassification
    _, report = auto.from_pretrained(tmp_path / "whole/model", output_loading_info=True)
    assert not report["missing_keys"]

    with killed(monkeypatch, "gruppo.training.reward_model.update", 6):
        train_reward_model(own, labelled, out=tmp_path / "run")
    again = train_reward_model(own, labelled, out=tmp_path / "run", resume=True)
    assert (again.before, again.after, again.updates) == (whole.before, whole.after, whole.updates)
    assert read_lines(tmp_path / "run/metrics.jsonl") == lines
    file = "model/model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def within(settings: dict[str, Any], size: int | str) -> dict[str, Any]:
    """The recipe with this run.memory, in bytes."""
    memory = size if isinstance(size, str) else f"{size // 1024} KiB"
    return {**settings, "run": {**settings["run"], "memory": memory}}


def facts_of(out: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((out / "environment.json").read_text())
    return facts


def test_labelling_has_the_slots_that_run_memory_allows(
    settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every continuation may have a prompt of its own: the question with all that was written so far."""
    monkeypatch.setattr("gruppo.engines.memory.process_bytes", lambda _: 0)
    label(within(settings, "9 GB"), out=tmp_path / "roomy")
    most = facts_of(tmp_path / "roomy")
    assert most["slots"] == 4 * 4 * 3
    forecast = most["memory_forecast"]
    budget = forecast["peak"] - forecast["cache"] // 2
    label(within(settings, budget), out=tmp_path / "tight")
    tight = facts_of(tmp_path / "tight")
    assert 1 < tight["slots"] < most["slots"]
    assert tight["memory_forecast"]["peak"] <= budget
    assert rows_of(tmp_path / "tight") == rows_of(labelled)
    with pytest.raises(
        UsageError, match=r"run\.memory: allows 0\.00 GB, but sampling needs .* sampling\.max_tokens or"
    ):
        label(within(settings, "1 MB"), out=tmp_path / "none")


def test_a_reward_model_is_trained_in_micro_batches_that_run_memory_allows(
    settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.engines.memory.process_bytes", lambda _: 0)
    settings = {**settings, "reward_model": {**settings["reward_model"], "batch_size": 32, "epochs": 5}}
    roomy = train_reward_model(within(settings, "9 GB"), labelled, out=tmp_path / "roomy")
    most = facts_of(tmp_path / "roomy")
    forecast = most["memory_forecast"]
    assert most["chosen"]["micro_batch_tokens"] == 1024
    assert forecast["peak"] == sum(size for part, size in forecast.items() if part != "peak")
    assert forecast["logits"] == 0
    least = forecast["peak"] - forecast["activations"] // 2
    with killed(monkeypatch, "gruppo.training.reward_model.update", 3):
        train_reward_model(within(settings, least), labelled, out=tmp_path / "tight")
    chosen = facts_of(tmp_path / "tight")["chosen"]
    assert 20 < chosen["micro_batch_tokens"] < 300
    assert facts_of(tmp_path / "tight")["memory_forecast"]["peak"] <= least
    with monkeypatch.context() as patch:  # a resume keeps the sizes, whatever is free by then
        patch.setattr("gruppo.training.sizing.choose_sizes", lambda *_: pytest.fail("chosen again"))
        tight = train_reward_model(within(settings, least), labelled, out=tmp_path / "tight", resume=True)
    assert facts_of(tmp_path / "tight")["chosen"] == chosen
    for name, value in roomy.after.items():
        assert tight.after[name] == pytest.approx(value, rel=1e-3)
    with pytest.raises(UsageError) as error:
        train_reward_model(within(settings, "1 MB"), labelled, out=tmp_path / "none")
    for words in ("run.memory: allows 0.00 GB, but training needs at least 0.1", "reward_model.name", "gruppo label"):
        assert words in str(error.value)
    assert not (tmp_path / "none/before.json").exists(), "before the held-out completions are scored"


def test_a_finished_training_is_read_and_not_repeated(
    settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train_reward_model(settings, labelled, out=tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_bytes()
    monkeypatch.setattr("gruppo.training.reward_model.update", lambda *_: pytest.fail("trained again"))
    assert train_reward_model(settings, labelled, out=tmp_path / "run", resume=True) == made
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    "place", ["gruppo.training.reward_model.quality", "gruppo.models.reward_model.save_reward_model"]
)
def test_an_interruption_after_the_last_update_saves_it(
    place: str, settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out completions are measured and the model is written without a checkpoint before."""

    def stops() -> None:
        raise Interrupted

    whole = train_reward_model(settings, labelled, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_call(patch, place, 2 if place.endswith("quality") else 1, stops)
        with pytest.raises(Interrupted):
            train_reward_model(settings, labelled, out=tmp_path / "run")
    names = [each.name for each in (tmp_path / "run/checkpoints").iterdir()]
    assert f"step-{whole.updates:06d}" in names
    assert train_reward_model(settings, labelled, out=tmp_path / "run", resume=True).after == whole.after


@pytest.mark.parametrize("allowed", [True, False])
def test_checkpoints_are_saved_when_they_are_due_and_take_little_of_the_time(
    allowed: bool, settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill then loses the updates since the last one; see test_saving_pace.py for how often they are saved."""
    monkeypatch.setattr("gruppo.training.saving_pace.SavingPace.allows", allowed)
    whole = train_reward_model(settings, labelled, out=tmp_path / "whole")
    with killed(monkeypatch, "gruppo.training.reward_model.update", 6):
        train_reward_model(settings, labelled, out=tmp_path / "run")
    saved = sorted(each.name for each in (tmp_path / "run").glob("checkpoints/*"))
    assert saved == (["step-000002", "step-000004"] if allowed else [])
    again = train_reward_model(settings, labelled, out=tmp_path / "run", resume=True)
    assert (again.before, again.after) == (whole.before, whole.after)
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert lines == read_lines(tmp_path / "whole/metrics.jsonl")


def test_a_model_with_another_tokenizer_tokenizes_the_texts_again(
    settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens have one, two or more letters; step ends match the ends of the texts."""
    from gruppo.training import reward_model_api as labelling

    seen: list[Any] = []
    policy = make_policy(vocab_size=64, initializer_range=0.02)
    save_model(policy, tmp_path / "model")
    tokenizer_of_pairs().save_pretrained(tmp_path / "model")
    original = labelling._encoded

    def kept(tokenizer: Any, each: Any) -> Any:
        seen.append((each, original(tokenizer, each), tokenizer))
        return seen[-1][1]

    monkeypatch.setattr(labelling, "_encoded", kept)
    own = {**settings, "reward_model": {**settings["reward_model"], "name": str(tmp_path / "model")}}
    train_reward_model(own, labelled, out=tmp_path / "run")
    assert len(seen) == 40
    assert any(len(made.completion.token_ids) < len(old.completion.token_ids) for old, made, _ in seen)
    for old, made, tokenizer in seen:
        for end, at in zip(made.ends, made.text_ends, strict=True):
            begun = tokenizer.decode(list(made.completion.token_ids[: end + 1]))
            before = tokenizer.decode(list(made.completion.token_ids[:end]))
            assert len(before) < at <= len(begun)
        assert set(made.text_ends) <= set(old.text_ends)


def tokenizer_of_pairs() -> Any:
    """A pair of equal letters is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.conftest import LETTERS

    pieces = ["<eos>", *LETTERS, "<", ">", *(2 * letter for letter in "abcdefghijklmnop")]
    made = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"([a-p])\1|."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"functions": []}}, r"reward\.functions: the first"),
        ({"reward_model": {"kind": "process", "prompts": 0}}, r"reward_model\.prompts = 0"),
        ({"reward_model": {"kind": "process", "split": "nowhere:split"}}, r"reward_model\.split"),
    ],
)
def test_unusable_recipes_for_labels_are_refused(
    changes: dict, message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        label({**settings, **changes}, out=tmp_path / "labels")


def test_unusable_labels_are_refused(settings: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no labels"):
        train_reward_model(settings, tmp_path, out=tmp_path / "run")
    plain = {name: each for name, each in settings.items() if name != "reward_model"}
    with pytest.raises(UsageError, match=r"\[reward_model\]: missing"):
        train_reward_model(plain, labelled, out=tmp_path / "run")


def test_both_commands(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(settings))
    run = CliRunner().invoke
    made = run(app, ["label", str(path), "--out", str(tmp_path / "labels"), "--set", "reward_model.prompts=8"])
    assert made.exit_code == 0, made.output
    assert "32 completions" in made.output
    trained = run(app, ["reward-model", str(path), str(tmp_path / "labels"), "--out", str(tmp_path / "model")])
    assert trained.exit_code == 0, trained.output
    assert "calibration_error" in trained.output


def test_folders_of_other_kinds_are_refused(settings: dict[str, Any], labelled: Path) -> None:
    before = rows_of(labelled)
    with pytest.raises(UsageError, match="contains a set of labels, not a reward model"):
        train_reward_model(settings, labelled, out=labelled, resume=True)
    with pytest.raises(UsageError, match="contains a set of labels, not a run"):
        train(settings, out=labelled, resume=True)
    assert rows_of(labelled) == before


def test_a_resume_with_other_labels_is_refused(settings: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    train_reward_model(settings, labelled, out=tmp_path / "model")
    label(settings, out=tmp_path / "labels", overrides=["run.seed=1"])
    with pytest.raises(UsageError, match="labels_sha256 has changed since the start"):
        train_reward_model(settings, tmp_path / "labels", out=tmp_path / "model", resume=True)


def test_an_interruption_saves_what_was_learned(
    settings: dict[str, Any], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five updates are done although run.checkpoint_every is 100."""

    def stops() -> None:
        raise Interrupted

    own = {**settings, "run": {**settings["run"], "checkpoint_every": 100}}
    whole = train_reward_model(own, labelled, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_call(patch, "gruppo.training.reward_model.update", 6, stops)
        with pytest.raises(Interrupted):
            train_reward_model(own, labelled, out=tmp_path / "run")
    assert [each.name for each in (tmp_path / "run/checkpoints").iterdir()] == ["step-000005"]
    again = train_reward_model(own, labelled, out=tmp_path / "run", resume=True)
    assert again.after == whole.after

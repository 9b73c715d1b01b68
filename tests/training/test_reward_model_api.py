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

"""Sequence-classification models as rewards, tested with tiny models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from gruppo.errors import UsageError
from gruppo.rewards.classifier import Classifier
from gruppo.rollout.workers.rewards import RewardPool
from tests.conftest import make_policy, make_tokenizer
from tests.hub_server import WRITER, Hub, serving, use
from tests.rollout.workers.test_rewards import group, totals

QUESTION = [{"role": "user", "content": "one or two"}]


def save_llama(folder: Path, template: bool = True, **settings: Any) -> str:
    torch.manual_seed(1)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        **{**sizes, "num_attention_heads": 4, "num_labels": 1, "max_position_embeddings": 40, **settings}
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if template else None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """One output, a chat template, no padding token in its config."""
    return save_llama(tmp_path / "llama")


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """Three labels, no chat template."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        id2label={0: "bad", 1: "so so", 2: "good"},
        label2id={"bad": 0, "so so": 1, "good": 2},
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def logits_of(folder: str, text: str) -> torch.Tensor:
    """Logits of transformers for a text, one token per character."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = make_tokenizer()(text)["input_ids"]
    assert len(ids) == len(text)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def answers(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_conversation_goes_through_the_template(llama: str) -> None:
    values = Classifier(llama)([QUESTION] * 3, answers("one", "twotwo", ""))
    expected = [float(logits_of(llama, f"<one or two><{text}>")[0]) for text in ("one", "twotwo", "")]
    assert values == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in expected}) == 3


def test_completion_of_a_started_assistant_message_is_one_message(llama: str) -> None:
    started = [*QUESTION, {"role": "assistant", "content": "it is "}]
    (value,) = Classifier(llama)([started], answers("one"))
    assert value == pytest.approx(float(logits_of(llama, "<one or two><it is one>")[0]), abs=1e-6)


def test_plain_texts_are_concatenated(llama: str) -> None:
    (value,) = Classifier(llama)(["one or "], ["two"])
    assert value == pytest.approx(float(logits_of(llama, "one or two")[0]), abs=1e-6)


def test_conversation_without_a_template_is_text(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "plain", template=False)
    (value,) = Classifier(folder)([QUESTION], answers("one"))
    token_ids = make_tokenizer()("one or two\none")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert value == pytest.approx(float(model(input_ids=torch.tensor([token_ids])).logits), abs=1e-6)


@pytest.mark.parametrize("label", ["good", 2])
def test_reward_of_a_label_is_its_probability(bert: str, label: str | int) -> None:
    values = Classifier(bert, label=label)(["one "] * 2, ["two", "three"])
    expected = [float(logits_of(bert, f"one {text}").softmax(0)[2]) for text in ("two", "three")]
    assert values == pytest.approx(expected, abs=1e-6)
    assert all(0 < value < 1 for value in expected)


def test_multi_label_probabilities_are_independent(tmp_path: Path) -> None:
    kind = "multi_label_classification"
    folder = save_llama(tmp_path / "many", num_labels=2, problem_type=kind)
    (value,) = Classifier(folder, label="LABEL_1")(["one "], ["two"])
    assert value == pytest.approx(float(logits_of(folder, "one two").sigmoid()[1]), abs=1e-6)


def test_too_long_a_text_fails_and_is_never_truncated(llama: str) -> None:
    """The model has 40 positions; an empty text has no tokens."""
    with RewardPool(["classifier"], [], [], timeout=60, workers=1, options={"classifier": {"model": llama}}) as pool:
        prompt, completions = group("a" * 39, "a" * 40)  # after a prompt of one letter
        fits, over = pool.score([(prompt, completions)], {})[0][0]
    assert fits.total == pytest.approx(float(logits_of(llama, "q" + "a" * 39)[0]), abs=1e-6)
    assert over.total is None
    assert "41 tokens; the model accepts 1 to 40" in str(over.failure)
    assert isinstance(Classifier(llama)([""], [""])[0], ValueError)


def test_value_does_not_depend_on_the_batch(llama: str) -> None:
    model = Classifier(llama)
    together = model([QUESTION] * 3, answers("a", "abcdef", "abc"))
    assert together == [model([QUESTION], answers(text))[0] for text in ("a", "abcdef", "abc")]


def test_conversation_through_the_pool(llama: str) -> None:
    with RewardPool(["classifier"], [2.0], [], timeout=60, workers=1, options={"classifier": {"model": llama}}) as pool:
        rewards = pool.score([group("one", chat=True)], {})[0][0]
    assert totals(rewards) == [pytest.approx(2 * float(logits_of(llama, "<q><one>")[0]), abs=1e-6)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "./none"}, ["model = './none'", "no such folder"]),
        ({"model": 3}, ["model = 3"]),
        ({"model": "LLAMA", "label": "good"}, ["label = 'good'", "single output"]),
        ({"model": "BERT"}, ["label: missing", "bad (0), so so (1), good (2)"]),
        ({"model": "BERT", "label": "goood"}, ["label = 'goood'", 'did you mean "good"']),
        ({"model": "BERT", "label": 3}, ["label = 3"]),
        ({"model": "LLAMA", "device": "gpu"}, ["gpu", "auto, cpu, cuda or mps"]),
    ],
)
def test_wrong_options(llama: str, bert: str, options: dict[str, Any], words: list[str]) -> None:
    named = {key: {"LLAMA": llama, "BERT": bert}.get(value, value) for key, value in options.items()}
    with pytest.raises(UsageError) as caught:
        Classifier(**named)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, r"reward\.options\.classifier\.model: missing"),
     ({"model": "./none"}, r"reward\.options\.classifier\.model = './none': there is no such folder")],
)  # fmt: skip
def test_wrong_options_are_refused_before_the_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RewardPool(["classifier"], [], [], workers=1, options={"classifier": options})


def test_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    """transformers would continue with a random head."""
    make_policy().model.save_pretrained(tmp_path / "language-model")
    make_tokenizer().save_pretrained(tmp_path / "language-model")
    with pytest.raises(UsageError, match=r"no weights for score\.weight"):
        Classifier(str(tmp_path / "language-model"))


def test_broken_folder_and_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        Classifier(str(tmp_path))
    monkeypatch.setattr("gruppo.rewards.classifier.out_of_reach", lambda *_: True)
    for name in ("someone/reward-model", "someone/reward-model@v1"):
        with pytest.raises(UsageError, match="hub cannot be reached"):
            Classifier(name)


def test_a_model_on_the_hub_at_a_revision(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_llama(tmp_path / "other", initializer_range=0.9)
    hub = Hub()
    hub.add("me/judge", files_of(llama))
    hub.repositories["models", "me/judge"].commit("refs/pr/1", files_of(other))
    asked = [QUESTION], answers("one")
    with serving(hub) as address:
        use(address, WRITER, str(tmp_path / "cache"), monkeypatch)
        found = {name: Classifier(name, device="cpu")(*asked) for name in ("me/judge", "me/judge@refs/pr/1")}
        with pytest.raises(UsageError, match=r"model = 'me/judge@v9': the repository has no such revision; write one"):
            Classifier("me/judge@v9")
        with pytest.raises(UsageError, match=r"model = 'me/none': there is no such repository"):
            Classifier("me/none")
    use("http://127.0.0.1:9", None, str(tmp_path / "cache"), monkeypatch)  # nothing listens there: from the cache
    assert Classifier("me/judge@refs/pr/1", device="cpu")(*asked) == found["me/judge@refs/pr/1"]
    expected = {"me/judge": llama, "me/judge@refs/pr/1": other}
    assert found == {name: Classifier(folder, device="cpu")(*asked) for name, folder in expected.items()}
    assert found["me/judge"] != found["me/judge@refs/pr/1"]


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

"""Trainers with TRL's interface, on the tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, EarlyStoppingCallback, TrainerCallback

from gruppo.errors import RunError, UsageError
from gruppo.models.weights import save_model
from gruppo.runs.results import load_result
from gruppo.trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from tests.conftest import make_policy

ROWS = [{"prompt": f"{first}{second}", "answer": first} for first in "abcdef" for second in "12"]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]


LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def counted(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "abcdefg" for letter in text)) for text in completions]


def arguments(out: Path, **changes: Any) -> GRPOConfig:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "bf16": False,
        "disable_tqdm": True,
    }
    return GRPOConfig(str(out), **{**options, **changes})


SERVED = ("train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "log", "evaluate", "save")


class Seen(TrainerCallback):
    """Records its calls, and stops at a step."""

    def __init__(self, stop: int = 0) -> None:
        self.calls: list[str] = []
        self.stop = stop


def recorded(name: str) -> Callable[..., Any]:
    def call(self: Seen, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.calls.append(f"{name} {state.global_step}")
        if name == "step_end" and state.global_step == self.stop:
            control.should_training_stop = True
        return control

    return call


for moment in SERVED:
    setattr(Seen, f"on_{moment}", recorded(moment))


class Run:
    """A training whose results several tests look at."""

    def __init__(self, model: str, out: Path) -> None:
        self.calls: list[dict[str, Any]] = []
        self.seen, self.out = Seen(), out
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=[self.letters, self.sometimes, lambda completions, **_: [0.0] * len(completions)],
            args=arguments(
                out, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=3, reward_weights=[1.0, 2.0, 0.0],
                num_generations_eval=2, save_steps=2,
            ),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=DatasetDict({"near": Dataset.from_list(ROWS[:2]), "far": Dataset.from_list(ROWS[2:5])}),
            callbacks=[self.seen],
        )  # fmt: skip
        self.output = self.trainer.train()
        self.called = list(self.seen.calls)

    def letters(self, prompts: list[str], completions: list[str], answer: list[str], **more: Any) -> list[float]:
        """A bound method, which keeps what it gets."""
        self.calls.append({"prompts": prompts, "answer": answer, "step": more["trainer_state"].global_step, **more})
        more["log_metric"]("letters", 3.0)
        more["log_extra"]("first", [text[:1] for text in completions])
        return counted(completions)

    async def sometimes(self, completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if len(ids) % 2 else 1.0 for ids in completion_ids]


@pytest.fixture(scope="module")
def run(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tiny_folder, tmp_path_factory.mktemp("trl") / "out")


def test_functions_are_called_once_per_step_with_all_completions_and_columns(run: Run) -> None:
    training = [call for call in run.calls if len(call["prompts"]) == 8]
    assert [call["step"] for call in training] == [0, 1, 2, 3]
    for call in training:
        assert [prompt[0] for prompt in call["prompts"]] == call["answer"]
        assert call["prompts"][0] == call["prompts"][3] != call["prompts"][4]
        assert set(call) == {
            "prompts", "answer", "step", "completion_ids", "trainer_state", "log_extra", "log_metric",
        }  # fmt: skip
        assert call["trainer_state"] is run.trainer.state


def test_log_history_has_the_names_of_trl(run: Run) -> None:
    lines = [line for line in run.trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    expected = {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens",
        "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "rewards/letters/mean", "rewards/letters/std", "rewards/sometimes/mean", "rewards/<lambda>/mean", "letters",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "step_time", "epoch", "step",
    }  # fmt: skip
    assert expected <= lines[0].keys()
    assert lines[0]["letters"] == 3.0
    assert lines[0]["rewards/sometimes/mean"] == 1.0
    assert lines[1]["num_tokens"] > lines[0]["num_tokens"] > 0
    assert lines[1]["epoch"] == pytest.approx(4 / 6)
    assert run.trainer.state.log_history[-1]["train_loss"] == run.output.training_loss
    assert run.output.global_step == 4


def test_names_in_log_history_are_names_of_trl(run: Run) -> None:
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    source = Path(str(trl.__file__)).read_text()
    ours = {"loss", "grad_norm", "learning_rate", "epoch", "step", "letters"}  # of transformers, and of the function
    for name in next(line for line in run.trainer.state.log_history if "loss" in line):
        assert name in ours or name.startswith("rewards/") or f'"{name}"' in source, name


def test_run_folder_records_everything(run: Run) -> None:
    assert run.trainer.result is not None
    result = load_result(run.out / "gruppo")
    assert len(result.metrics) == 4
    rollouts = result.rollouts(1)
    assert len(rollouts) == 8
    assert json.loads(rollouts.extra[0])["first"] == rollouts.text[0][:1]
    line = next(line for line in run.trainer.state.log_history if line["step"] == 2 and "loss" in line)
    means = [metrics["reward/mean"] for metrics in result.metrics[:2]]
    assert line["reward"] == pytest.approx(sum(means) / 2)


def test_evaluation_samples_every_set(run: Run) -> None:
    lines = [line for line in run.trainer.state.log_history if "eval_near_reward" in line]
    assert [line["step"] for line in lines] == [3, 4]
    assert {"eval_far_reward", "eval_far_rewards/letters/mean", "eval_near_completions/mean_length"} <= lines[0].keys()
    again = run.trainer.evaluate(Dataset.from_list(ROWS[:2]), metric_key_prefix="test")
    assert (
        again["test_reward"]
        == run.trainer.evaluate(Dataset.from_list(ROWS[:2]), metric_key_prefix="test")["test_reward"]
    )
    assert [len(call["prompts"]) for call in run.calls[-2:]] == [4, 4]


def test_callbacks_are_called_in_the_order_of_transformers(run: Run) -> None:
    calls = [call for call in run.called if "log" not in call]
    assert calls[:8] == [
        "train_begin 0", "epoch_begin 0", "step_begin 0", "step_end 1", "step_begin 1", "step_end 2", "save 2",
        "step_begin 2",
    ] or calls[:8] == [
        "train_begin 0", "epoch_begin 0", "step_begin 0", "step_end 1", "step_begin 1", "step_end 2", "step_begin 2",
        "save 2",
    ]  # fmt: skip
    assert calls.count("evaluate 3") == calls.count("evaluate 4") == 1
    assert run.called[-1] == "train_end 4"
    assert "log 2" in run.called


def test_a_trainer_trains_once(run: Run) -> None:
    with pytest.raises(UsageError, match="make a new trainer"):
        run.trainer.train()


def test_saved_model_is_the_trained_one(run: Run, tmp_path: Path) -> None:
    run.trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    for name, tensor in run.trainer.model.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name])
    run.trainer.save_model()
    assert (run.out / "model.safetensors").is_file()
    run.trainer.save_state()
    run.trainer.save_metrics("train", {"train_loss": 1.0})
    assert json.loads((run.out / "trainer_state.json").read_text())["global_step"] == 4
    assert json.loads((run.out / "all_results.json").read_text()) == {"train_loss": 1.0}


def test_a_second_training_has_a_folder_of_its_own(tiny_folder: str, tmp_path: Path) -> None:
    for _ in range(2):
        GRPOTrainer(tiny_folder, counted, arguments(tmp_path / "out", max_steps=1), ROWS).train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gruppo", "gruppo-2"]


def test_a_stopped_training_continues_bit_for_bit(tiny_folder: str, tmp_path: Path) -> None:
    whole = GRPOTrainer(tiny_folder, counted, arguments(tmp_path / "whole", max_steps=4), ROWS)
    whole.train()
    options = {"max_steps": 4, "save_steps": 1}

    def dies(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step == 2:
            raise ConnectionError("no answer")
        return counted(completions)

    dies.__name__ = dies.__qualname__ = "counted"
    with pytest.raises(RunError, match="ConnectionError: no answer"):
        GRPOTrainer(tiny_folder, dies, arguments(tmp_path / "out", **options), ROWS).train()
    resumed = GRPOTrainer(tiny_folder, counted, arguments(tmp_path / "out", **options), ROWS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert [line["step"] for line in resumed.state.log_history if "loss" in line] == [1, 2, 3, 4]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


def test_a_checkpoint_of_another_folder_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    trainer = GRPOTrainer(tiny_folder, counted, arguments(tmp_path / "out"), ROWS)
    with pytest.raises(UsageError, match="is not in output_dir"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-5"))


def test_control_stops_the_training(tiny_folder: str, tmp_path: Path) -> None:
    seen = Seen(stop=2)
    trainer = GRPOTrainer(tiny_folder, counted, arguments(tmp_path, max_steps=5), ROWS, callbacks=[seen])
    assert trainer.train().global_step == 2
    assert seen.calls[-1] == "train_end 2"


def test_early_stopping_of_transformers_works(tiny_folder: str, tmp_path: Path) -> None:
    args = arguments(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_reward",
        greater_is_better=True, learning_rate=0.0,
    )  # fmt: skip
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = GRPOTrainer(tiny_folder, counted, args, ROWS, ROWS[:2], callbacks=[stopping])
    assert trainer.train().global_step < 6


@pytest.mark.parametrize("moment", ["on_substep_end", "on_optimizer_step"])
def test_moments_that_do_not_exist_are_refused(tiny_folder: str, tmp_path: Path, moment: str) -> None:
    callback = type("Mine", (TrainerCallback,), {moment: lambda *_, **__: None})
    with pytest.raises(UsageError, match=f"Mine.{moment}: a run has no such moment; write on_step_end"):
        GRPOTrainer(tiny_folder, counted, arguments(tmp_path), ROWS, callbacks=[callback()])


def test_model_in_memory_is_trained_in_place(tiny_folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    trainer = GRPOTrainer(model, counted, arguments(tmp_path), ROWS, processing_class=tokenizer)
    trainer.train()
    assert trainer.model is model
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_changed_chat_template_is_used(tiny_folder: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}+{{ m['content'] }}+{% endfor %}"
    trainer = GRPOTrainer(
        tiny_folder, lambda completions, **_: [len(one[0]["content"]) for one in completions],
        arguments(tmp_path, max_steps=1), CHATS, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.result is not None
    first = trainer.result.rollouts(1).prompt_token_ids[0]
    assert tokenizer.decode(first).startswith("+")


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters(tiny_folder: str, tmp_path: Path, wrapped: bool) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    model: Any = tiny_folder
    if wrapped:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
    trainer = GRPOTrainer(
        model, counted, arguments(tmp_path), ROWS, peft_config=None if wrapped else config,
        processing_class=AutoTokenizer.from_pretrained(tiny_folder) if wrapped else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], sorted(saved["target_modules"])) == (2, ["q_proj", "v_proj"])
    assert trainer.result is not None
    assert load_result(trainer.result.path).summary["state"] == "done"


@pytest.mark.parametrize("where", ["argument", "model_init_kwargs"])
def test_four_bit_weights_under_adapters(tiny_folder: str, tmp_path: Path, where: str) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options: dict[str, Any] = {"quantization_config": config} if where == "argument" else {}
    args = arguments(tmp_path, **({} if options else {"model_init_kwargs": {"quantization_config": config}}))
    trainer = GRPOTrainer(tiny_folder, counted, args, ROWS, peft_config=LORA, **options)
    recipe = trainer._plan().recipe
    assert recipe.model.lora is not None
    assert recipe.model.lora.base == "4bit"


def test_a_quantized_model_in_memory_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.is_quantized = True
    with pytest.raises(UsageError, match="its weights are quantized"):
        GRPOTrainer(model, counted, arguments(tmp_path), ROWS, peft_config=LORA)


def test_adapters_that_gruppo_lacks_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use_dora = True: adapters are plain LoRA"):
        GRPOTrainer(tiny_folder, counted, arguments(tmp_path), ROWS, peft_config=LoraConfig(use_dora=True))


class Counter:
    """An environment as TRL takes it."""

    def __init__(self) -> None:
        self.count = 0
        self.start = ""

    def reset(self, answer: str, **_: Any) -> str:
        self.start = answer
        return "?"

    def add(self, number: int) -> str:
        """Add a number.

        Args:
            number: What to add.
        """
        self.count += number
        return f"{self.count}"

    def get_reward(self) -> float:
        return float(self.count)


def test_environments_live_in_the_process_of_the_script(tmp_path: Path) -> None:
    save_model(make_policy(initializer_range=0.02, max_position_embeddings=1024), tmp_path / "model")
    got: list[Any] = []

    def score(completions: list[Any], environments: list[Counter], answer: list[str], **_: Any) -> list[float]:
        got.extend(environments)
        assert [one.start for one in environments] == answer
        return [float(len(one[-1]["content"])) for one in completions]

    trainer = GRPOTrainer(
        str(tmp_path / "model"),
        score,
        arguments(tmp_path, max_completion_length=12),
        CHATS,
        environment_factory=Counter,
    )
    trainer.train()
    assert len(got) == 16
    assert len({id(one) for one in got}) == 16
    line = trainer.state.log_history[0]
    assert line["rewards/environment/mean"] == 0.0
    assert "tools/call_frequency" in line


def test_messages_of_tool_calls(tiny_folder: str) -> None:
    from gruppo.rollout.environments.client import EnvironmentHandle
    from gruppo.trl.local_environments import LocalEnvironments

    environments = LocalEnvironments(Counter)
    play = EnvironmentHandle(1, {"prompt": [], "answer": "a"}, 0)
    assert environments.answer([play], lambda: None)[0].observations == ("?",)
    written = 'I add. <tool_call>{"name": "add", "arguments": {"number": 2}}</tool_call>'
    play.texts.append(written)
    assert environments.answer([play], lambda: None)[0].observations == ("2",)
    play.texts.append("That is 2.")
    assert environments.answer([play], lambda: None)[0].observations is None
    assert environments.messages(0, f"{written}\n2\nThat is 2.") == [
        {
            "role": "assistant",
            "content": "I add. ",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"number": 2}}}],
        },
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "That is 2."},
    ]
    assert environments.end([play], lambda: None)[0].reward == 2.0


def test_functions_as_tools_and_their_failures() -> None:
    from gruppo.rollout.environments.client import EnvironmentHandle
    from gruppo.trl.local_environments import LocalEnvironments

    def fails(number: int) -> int:
        """Fail."""
        raise LookupError(f"no {number}")

    environments = LocalEnvironments(None, [fails])
    assert [schema["function"]["name"] for schema in environments.schemas] == ["fails"]
    play = EnvironmentHandle(1, {"prompt": []}, 0)
    environments.answer([play], lambda: None)
    play.texts.append('<tool_call>{"name": "fails", "arguments": {"number": 3}}</tool_call>')
    answer = environments.answer([play], lambda: None)[0]
    assert (answer.observations, answer.errors, answer.failure) == (("Error: LookupError: no 3",), 1, None)


def test_an_environment_that_is_none_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no reset"):
        GRPOTrainer(
            tiny_folder, counted, arguments(tmp_path), CHATS, environment_factory=type("Bare", (), {"act": lambda s: 1})
        )


def test_preferences_and_demonstrations(tiny_folder: str, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{a}", "chosen": f"{a}{a}", "rejected": "zz"} for a in "abcd"]
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2, "disable_tqdm": True, "bf16": False}
    dpo = DPOTrainer(tiny_folder, args=DPOConfig(str(tmp_path / "dpo"), **options), train_dataset=pairs)
    assert dpo.train().training_loss == pytest.approx(0.693, abs=0.01)  # log 2 where the policy is the reference
    rows = [{"prompt": f"{a}", "completion": f"{a}{a}"} for a in "abcd"]
    sft = SFTTrainer(tiny_folder, SFTConfig(str(tmp_path / "sft"), **options), rows)
    assert sft.train().global_step == 2
    with pytest.raises(UsageError, match=r"evaluate\(\): SFTTrainer has none"):
        sft.evaluate()


def test_rows_that_sft_would_read_differently_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), disable_tqdm=True)
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(UsageError, match="assistant_only_loss=True"):
        SFTTrainer(tiny_folder, args, chat).train()
    with pytest.raises(UsageError, match="no completion to train on"):
        SFTTrainer(tiny_folder, args, [{"text": "abc"}]).train()


def test_rloo(tiny_folder: str, tmp_path: Path) -> None:
    args = RLOOConfig(
        str(tmp_path), max_steps=1, max_completion_length=4, disable_tqdm=True, bf16=False, logging_steps=1
    )
    trainer = RLOOTrainer(tiny_folder, counted, args, ROWS)
    trainer.train()
    assert "kl" in trainer.state.log_history[0]


def table() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.mark.parametrize("rows", [lambda: ROWS, table, lambda: table().to_iterable_dataset()])
def test_kinds_of_rows(tiny_folder: str, tmp_path: Path, rows: Callable[[], Any]) -> None:
    trainer = GRPOTrainer(tiny_folder, counted, arguments(tmp_path, max_steps=1), rows())
    assert trainer.train().global_step == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (DatasetDict({"train": table()}), "has the splits train; give one of them"),
        ([], "has no rows"),
        ("trl-lib/tldr", "load_dataset"),
        ([{"prompt": "a", "image": "x.png"}], "has the column image"),
        (["a"], "not a mapping"),
    ],
    ids=["splits", "empty", "name", "image", "text"],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_refused(tiny_folder: str, tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        GRPOTrainer(tiny_folder, counted, arguments(tmp_path), rows).train()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "without a peft_config: trained weights are float32"),
        ({"quantization_config": {"load_in_8bit": True}, "peft_config": LORA}, 'model.lora.base = "4bit"'),
        ({"quantization_config": object(), "peft_config": LORA}, "quantization_config = object: trained weights"),
        ({"args": GRPOConfig("out", model_init_kwargs={"quantization_config": {"load_in_4bit": True}})}, "adapters"),
        ({"reward_funcs": [3]}, "neither a function nor the name of a reward model"),
        ({"reward_funcs": None}, "reward_funcs: missing"),
        ({"callbacks": [print]}, "no TrainerCallback"),
        ({"args": DPOConfig("out")}, "from gruppo.trl import GRPOConfig"),
        ({"processing_class": "tiny"}, "give the tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_gruppo_lacks_are_refused(
    tiny_folder: str, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    options: dict[str, Any] = {"reward_funcs": counted, "args": arguments(tmp_path), "train_dataset": ROWS, **given}
    with pytest.raises(UsageError) as caught:
        GRPOTrainer(tiny_folder, **options)
    assert words in str(caught.value)


def test_weights_that_do_not_fit_are_refused(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 numbers for 1 reward functions"):
        GRPOTrainer(tiny_folder, counted, arguments(tmp_path, reward_weights=[1.0, 2.0]), ROWS)


def test_a_reward_that_fails_ends_the_run_with_its_reason(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"3 values for 8|returned 3 values"):
        GRPOTrainer(tiny_folder, lambda completions, **_: [1.0] * 3, arguments(tmp_path), ROWS).train()


def test_functions_need_not_be_picklable(tiny_folder: str, tmp_path: Path) -> None:
    lock = threading.Lock()

    def locked(completions: list[str], **_: Any) -> list[float]:
        with lock:
            return counted(completions)

    GRPOTrainer(tiny_folder, locked, arguments(tmp_path, max_steps=1), ROWS).train()

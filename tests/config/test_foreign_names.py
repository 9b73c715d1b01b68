"""Names of other trainers are answered with gruppo's field, or with the reason why there is none."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from gruppo.config import foreign_names
from gruppo.config.foreign_names import NOTHING, gruppo_name, is_ignored
from gruppo.config.foreign_table import IGNORED, MISSING, NAMES
from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Section


def answer(place: str, value: Any = 1) -> str:
    """What the error says after "unknown field" for a field at this place."""
    data: Any = value
    for part in reversed(place.split(".")):
        data = {part: data}
    with pytest.raises(RecipeError) as caught:
        load_recipe({**data, "model": {"name": "m", **data.get("model", {})}})
    (line,) = str(caught.value).splitlines()
    return re.split(r"unknown (?:field|table); ", line)[1]


@pytest.mark.parametrize("place", ["run", "method", "optimizer", "sampling", "task"])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("model_name_or_path", "model.name"),
        ("num_train_epochs", "run.epochs"),
        ("max_turns", "environment.turns"),
        ("stop_strings", "sampling.stop"),
        ("stop_words", "sampling.stop"),
        ("stop_sequences", "sampling.stop"),
        ("num_generations", "sampling.group_size"),
        ("batch_size", "sampling.prompts_per_step"),
        ("lr", "optimizer.learning_rate"),
    ],
)
def test_a_name_means_the_same_in_every_table(place: str, name: str, field: str) -> None:
    assert answer(f"{place}.{name}") == f"write {field}"


@pytest.mark.parametrize(
    ("place", "written"),
    [
        ("run.dataset", "task.name"),
        ("run.dataset_name", "task.name"),
        ("method.run_name", "run.name"),
        ("model.run_name", "run.name"),
        ("evaluation.temperature", "evaluation.decoding.temperature"),
        ("evaluation.stop_words", "evaluation.decoding.stop"),
        ("evaluation.top_p", "evaluation.decoding.top_p"),
        ("evaluation.num_samples", "evaluation.samples"),
        ("evaluation.max_new_tokens", "evaluation.max_tokens"),
        ("evaluation.dataset", "evaluation.task"),
        ("evaluation.task.dataset", "evaluation.task.name"),
        ("evaluation.system_prompt", "evaluation.task.system"),
        ("evaluation.split", "evaluation.task.split"),
        ("critic.lr", "critic.learning_rate"),
        ("critic.model_name_or_path", "critic.name"),
        ("critic.cliprange", "critic.clip"),
        ("reward_model.num_train_epochs", "reward_model.epochs"),
        ("reward_model.pretrain", "reward_model.name"),
        ("model.rank", "model.lora.rank"),
    ],
)
def test_a_table_with_a_field_of_its_own_is_meant(place: str, written: str) -> None:
    assert answer(place) == f"write {written}"


@pytest.mark.parametrize(
    ("place", "written"),
    [
        ("critic.model.path", "critic.name"),
        ("critic.optim.lr", "critic.learning_rate"),
        ("critic.optim.learning_rate", "critic.learning_rate"),
        ("critic.optim.weight_decay", "optimizer.weight_decay"),
        ("actor_rollout_ref.model.path", "model.name"),
        ("actor_rollout_ref.rollout.n", "sampling.group_size"),
        ("actor_rollout_ref.rollout.val_kwargs.n", "evaluation.samples"),
        ("actor_rollout_ref.rollout.val_kwargs.temperature", "evaluation.decoding.temperature"),
        ("actor_rollout_ref.rollout.multi_turn.max_turns", "environment.turns"),
        ("custom_reward_function.path", "reward.functions"),
        ("algorithm.filter_groups.enable", "method.dynamic_sampling_rounds"),
        ("trainer.total_epochs", "run.epochs"),
    ],
)
def test_tables_of_other_trainers(place: str, written: str) -> None:
    assert answer(place) == f"for {place.rpartition('.')[2]} write {written}"


@pytest.mark.parametrize("name", ["gpu_memory_utilization", "prompt_length", "n", "top_p"])
def test_the_server_of_another_model_has_no_field_of_the_policy(name: str) -> None:
    server = gruppo_name(["reward", "reward_model", "rollout", name])
    assert server == f"{NOTHING}a reward model needs no server"
    teacher = gruppo_name(["distillation", "teacher_models", "teacher_model", "inference", name])
    assert teacher == f"{NOTHING}there is no distillation"


def test_answers_that_depend_on_the_value_or_need_words() -> None:
    assert answer("optimizer.warmup", 0.1) == "write optimizer.warmup_ratio"
    assert answer("optimizer.warmup", 10) == "write optimizer.warmup_steps"
    assert "method.minibatches" in answer("ppo_mini_batch_size")
    assert answer("top_p").startswith("write evaluation.decoding.top_p")
    for name in ("max_length", "cutoff_len", "max_seq_length"):
        assert "task.max_prompt_tokens" in answer(name)
        assert "sampling.max_tokens" in answer(name)
    with pytest.raises(RecipeError, match=r"write warmup_ratio = 0\.1"):
        load_recipe({"model": {"name": "m"}, "optimizer": {"warmup_steps": 0.1}})


@pytest.mark.parametrize(
    "place",
    [
        "lora_dropout",
        "repetition_penalty",
        "do_train",
        "method.delta",
        "use_vllm",
        "evaluation.batch_size",
        "fsdp_config",
    ],
)
def test_names_without_a_counterpart_are_answered_with_the_reason(place: str) -> None:
    assert re.match("remove it: .{20}", answer(place))


def test_some_reasons_say_that_nothing_is_lost() -> None:
    assert is_ignored(gruppo_name(["logging_steps"]) or "")
    assert not is_ignored(gruppo_name(["lora_dropout"]) or "")
    assert not is_ignored(gruppo_name(["beta"]) or "")
    assert not IGNORED.keys() & MISSING.keys()


def test_tables_of_a_list_are_named_with_their_place() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": {"name": "m"}, "mixture": [{"dataset_name": "x"}],
                     "benchmarks": [{"task": "gsm8k", "num_generations": 4, "temperature": 1.0}]})  # fmt: skip
    message = str(caught.value)
    for written in ("mixture[0].name", "benchmarks[0].samples", "benchmarks[0].decoding.temperature"):
        assert f"write {written}" in message


def _exists(field: str) -> bool:
    section: Any = Recipe
    for part in field.split("."):
        if not (isinstance(section, type) and issubclass(section, Section)):
            return section == "options"  # of a task: any name
        if part not in section.model_fields:
            return False
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        section = inner[0] if inner else part
    return True


def test_every_answer_names_fields_that_exist() -> None:
    tables = "|".join(Recipe.model_fields)
    answers = [*NAMES.values(), *(there for table in foreign_names._IN_TABLE.values() for there in table.values())]
    named = {field for text in [*answers, *IGNORED, *MISSING] for field in
             re.findall(rf"\b(?:{tables})(?:\.[a-z_0-9]+)+", text)}  # fmt: skip
    assert len(named) > 40
    assert {field for field in named if not _exists(field)} == set()


def test_every_option_of_trl_is_answered() -> None:
    trl = pytest.importorskip("trl", reason="TRL is a test extra: make test installs it")
    peft = pytest.importorskip("peft")
    configs = [trl.GRPOConfig, trl.RLOOConfig, trl.DPOConfig, trl.SFTConfig, trl.RewardConfig, trl.KTOConfig]
    kinds = [*configs, trl.ModelConfig, trl.ScriptArguments]
    own = {name for section in Recipe.model_fields for name in _fields_of(section)}
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(names) > 200
    unanswered = sorted(name for name in names if name not in own and gruppo_name([name]) is None)
    assert unanswered == []
    lora = {"r", "lora_alpha", "target_modules", "lora_dropout", "modules_to_save", "use_rslora", "use_dora", "bias"}
    assert lora <= {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert [name for name in lora if gruppo_name([name]) is None] == []


def _fields_of(table: str) -> set[str]:
    annotation = Recipe.model_fields[table].annotation
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return {
        name for kind in kinds if isinstance(kind, type) and issubclass(kind, Section) for name in kind.model_fields
    }


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("beta", "method.kl_coef"),
        ("epsilon", "method.clip_low"),
        ("num_iterations", "method.inner_updates"),
        ("max_completion_length", "sampling.max_tokens"),
        ("lr_scheduler_type", "optimizer.schedule"),
        ("eval_steps", "evaluation.every"),
        ("dataset_test_split", "evaluation.task.split"),
        ("lora_r", "model.lora.rank"),
        ("report_to", "run.trackers"),
        ("log_with", "run.trackers"),
        ("trackio_space_id", NOTHING),
        ("save_strategy", NOTHING),
        ("torch_compile", NOTHING),
        ("per_device_eval_batch_size", NOTHING),
        ("vllm_tensor_parallel_size", NOTHING),
        ("label_smoothing", NOTHING),
    ],
)
def test_options_of_trl(name: str, meant: str) -> None:
    assert (gruppo_name([name]) or "").startswith(meant)


def test_trackers_of_other_trainers() -> None:
    assert 'write run.trackers = ["wandb"]' in answer("use_wandb")  # OpenRLHF
    assert "write run.trackers" in answer("trainer.logger")  # verl
    assert "WANDB_PROJECT" in answer("trainer.project_name")


# Options that set what is trained, from verl's ppo_trainer.yaml, OpenRLHF's train_ppo_ray, Unsloth and LLaMA-Factory.
OTHERS = """\
actor.ppo_mini_batch_size actor.ppo_micro_batch_size_per_gpu actor.use_dynamic_bsz actor.clip_ratio actor.clip_ratio_c
actor.loss_agg_mode actor.entropy_coeff actor.kl_loss_coef actor.ppo_epochs actor.shuffle actor.grad_clip optim.lr
optim.lr_warmup_steps_ratio optim.min_lr_ratio optim.warmup_style rollout.response_length rollout.enforce_eager
rollout.tensor_model_parallel_size rollout.max_model_len multi_turn.max_assistant_turns data.train_files data.val_files
data.prompt_key data.max_prompt_length data.train_batch_size data.filter_overlong_prompts algorithm.lam
algorithm.adv_estimator algorithm.norm_adv_by_std_in_grpo trainer.total_epochs trainer.save_freq trainer.test_freq
trainer.val_before_train trainer.n_gpus_per_node trainer.logger trainer.resume_mode
zero_stage actor_num_nodes colocate_all_models lora_rank rollout_batch_size micro_rollout_batch_size max_epochs
prompt_max_len generate_max_len l2 eps_clip dual_clip value_clip lambd normalize_reward n_samples_per_prompt
actor_learning_rate critic_learning_rate lr_warmup_ratio lr_scheduler kl_target init_kl_coef entropy_loss_coef
adam_betas reward_clip_range advantage_estimator use_kl_loss overlong_buffer_len pretrain reward_pretrain
critic_pretrain prompt_data prompt_split eval_temperature eval_n_samples_per_prompt input_key label_key use_wandb
dynamic_filtering max_len
load_in_4bit fast_inference max_lora_rank use_gradient_checkpointing random_state full_finetuning model_name
stage finetuning_type template cutoff_len dataset eval_dataset lora_target pref_beta val_size max_samples
preprocessing_num_workers overwrite_cache quantization_bit flash_attn
"""


@pytest.mark.parametrize("place", re.split(r"\s+", OTHERS.strip()))
def test_options_of_verl_openrlhf_unsloth_and_llama_factory(place: str) -> None:
    assert re.search(r"write|remove", answer(place)), place

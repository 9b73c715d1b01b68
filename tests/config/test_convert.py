"""Arguments of TRL, verl and OpenRLHF become recipes that load, with nothing dropped in silence."""

from __future__ import annotations

import dataclasses
import random
import runpy
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gruppo.config.foreign_names import fields_named, gruppo_name
from gruppo.config.loading import load_recipe, recipe_mistakes, recipe_tables
from gruppo.config.recipe import Recipe
from gruppo.conversion import openrlhf, trl, verl
from gruppo.conversion.convert import Conversion, convert
from gruppo.conversion.reading import names
from gruppo.errors import UsageError
from gruppo.trl import GRPOConfig
from gruppo.trl.recipes import Length, recipe_of

TRL = {
    "grpo.yaml": """
        # Qwen on word problems
        model_name_or_path: example/qwen-0.5b
        dataset_name: example/word-problems
        dataset_config: main
        reward_funcs: [accuracy_reward, think_format_reward, my_lib.rewards.short]
        reward_weights: [1.0, 0.5, 0.1]
        per_device_train_batch_size: 4
        gradient_accumulation_steps: 8
        num_processes: 2
        num_generations: 8
        max_completion_length: 768
        learning_rate: 2e-6
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        max_steps: 400
        beta: 0.01
        epsilon_high: 0.28
        loss_type: dr_grpo
        scale_rewards: false
        num_iterations: 2
        bf16: true
        use_vllm: true
        vllm_mode: colocate
        logging_steps: 5
        report_to: [wandb]
        entropy_coef: 0.01
        output_dir: out/Qwen-GRPO
    """,
    "cispo.yaml": """
        model_name_or_path: example/tiny
        dataset_name: example/maths
        reward_funcs: accuracy_reward
        loss_type: cispo
        epsilon_high: 5.0
        num_generations: 16
        per_device_train_batch_size: 16
        generation_batch_size: 64
    """,
    "rloo_small.yaml": """
        model_name_or_path: example/tiny
        dataset_name: example/maths
        num_generations: 4
        normalize_advantages: true
        reward_clip_range: [-1, 1]
        num_iterations: 3
    """,
    "dpo.yaml": """
        model_name_or_path: example/mistral
        dataset_name: example/preferences
        beta: 0.05
        loss_type: [sigmoid]
        max_length: 2048
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 16
        num_train_epochs: 1
        use_peft: true
        lora_r: 32
        lora_target_modules: [q_proj, v_proj]
        lora_dropout: 0.1
    """,
    "sft.yml": """
        model_name_or_path: example/smol
        datasets:
          - path: example/chat
            split: train_sft
          - path: example/code
            name: python
        packing: true
        assistant_only_loss: true
        learning_rate: 1.0e-5
        max_length: 4096
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
    """,
    "reward.yaml": """
        model_name_or_path: example/tiny
        dataset_name: example/preferences
        center_rewards_coefficient: 0.01
        learning_rate: 1e-4
        num_train_epochs: 2
    """,
}

VERL = {
    "run_grpo.sh": r"""
        #!/usr/bin/env bash
        set -xeuo pipefail
        # where things are
        MODEL=${MODEL:-"example/qwen-3b"}
        DATA=$HOME/data
        batch=$((128 * 2))   # prompts
        GROUP=5
        train_files="['$DATA/gsm8k/train.parquet', '$DATA/math/train.parquet']"
        if [ "$1" = big ]; then
            LENGTH=4096
        else
            LENGTH=1024
        fi
        python3 -m verl.trainer.main_ppo --config-path=config \
            algorithm.adv_estimator=grpo \
            data.train_files="$train_files" \
            data.train_batch_size=$batch \
            data.max_response_length=${LENGTH} \
            data.filter_overlong_prompts=True \
            actor_rollout_ref.model.path=$MODEL \
            actor_rollout_ref.actor.ppo_mini_batch_size=64 \
            actor_rollout_ref.actor.use_kl_loss=True \
            actor_rollout_ref.actor.kl_loss_coef=0.001 \
            actor_rollout_ref.actor.kl_loss_type=low_var_kl \
            actor_rollout_ref.actor.optim.lr=3e-6 \
            actor_rollout_ref.rollout.name=vllm \
            actor_rollout_ref.rollout.n=$GROUP \
            +actor_rollout_ref.rollout.engine_kwargs.vllm.swap_space=4 \
            custom_reward_function.path=rewards/judge.py \
            custom_reward_function.name=score \
            trainer.logger='["console","wandb"]' \
            trainer.experiment_name="qwen $GROUP" \
            trainer.total_epochs=3 $@ 2>&1 | tee log.txt
    """,
    "run_ppo.sh": r"""
        ARGS=(
            algorithm.adv_estimator=gae
            algorithm.use_kl_in_reward=True   # in the reward
            algorithm.lam=0.95
        )
        ARGS+=(critic.optim.lr=2e-5 critic.model.path=example/critic)
        torchrun --nproc_per_node 8 -m verl.trainer.main_ppo "${ARGS[@]}" \
            data.train_files=train.parquet actor_rollout_ref.model.path=example/llama \
            data.train_batch_size=64 trainer.total_training_steps=100
    """,
    "run_dapo.sh": r"""
        python -m recipe.dapo.main_dapo \
            algorithm.adv_estimator=grpo \
            algorithm.filter_groups.enable=True algorithm.filter_groups.max_num_gen_batches=10 \
            actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 \
            actor_rollout_ref.rollout.n=16 actor_rollout_ref.model.path=example/qwen-32b \
            actor_rollout_ref.actor.clip_ratio_c=10.0 actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum \
            reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=512 \
            reward_model.overlong_buffer.penalty_factor=0.5 \
            custom_reward_function.path=r.py data.train_files=dapo.parquet data.train_batch_size=512 \
            actor_rollout_ref.actor.ppo_mini_batch_size=32
    """,
    "rloo.yaml": """
        defaults: [_self_]
        algorithm: {adv_estimator: rloo, use_kl_in_reward: false}
        data:
          train_files: train.parquet
          train_batch_size: 32
          max_response_length: 256
        actor_rollout_ref:
          model: {path: example/tiny, lora_rank: 8}
          actor:
            ppo_mini_batch_size: ${data.train_batch_size}
            optim: {lr: 1e-5}
          rollout:
            n: 4
            response_length: ${oc.select:data.max_response_length,99}
        trainer: {total_epochs: 2, save_freq: 5}
    """,
}

OPENRLHF = {
    "train_reinforce.sh": r"""
        set -x
        ray job submit --address="http://127.0.0.1:8265" \
           --runtime-env-json='{"working_dir": "/w"}' \
           -- python3 -m openrlhf.cli.train_ppo_ray \
           --actor.num_nodes 1 \
           --actor.model_name_or_path example/llama-8b \
           --reward.model_name_or_path example/rm-8b \
           --algo.advantage.estimator reinforce_baseline \
           --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 1e-4 \
           --actor.eps_clip_low_high 0.2 0.27 \
           --train.batch_size 256 --rollout.batch_size 64 --rollout.n_samples_per_prompt 8 \
           --rollout.max_new_tokens 1024 \
           --data.prompt_dataset example/a,example/b --data.prompt_probs 0.7,0.3 \
           --data.input_key question --data.label_key answer --data.apply_chat_template \
           --actor.adam.lr 5e-7 --actor.lr_scheduler constant \
           --vllm.num_engines 2 --ds.zero_stage 3
    """,
    "train_old.sh": r"""
        read -r -d '' training_commands <<EOF
        openrlhf.cli.train_ppo \
           --pretrain example/llama-8b \
           --remote_rm_url http://localhost:5000/get_reward \
           --save_path ./ckpt/llama-rlhf \
           --train_batch_size 128 --rollout_batch_size 1024 --micro_train_batch_size 2 \
           --max_epochs 2 --prompt_max_len 1024 --generate_max_len 512 \
           --actor_learning_rate 5e-7 --critic_learning_rate 9e-6 --init_kl_coef 0.02 \
           --prompt_data json@data/prompts.jsonl --input_key text --input_template $'User: {}\nAssistant: ' \
           --bf16 --flash_attn --normalize_reward
        EOF
        if [[ ${1} != "slurm" ]]; then
            deepspeed --module $training_commands
        fi
    """,
    "train_dr_grpo.sh": r"""
        deepspeed --module openrlhf.cli.train_ppo_ray --algo.advantage.estimator=dr_grpo \
          --actor.model_name_or_path=example/q --reward.remote_url=reward.py --rollout.n_samples_per_prompt=4 \
          --algo.kl.init_coef=0 --algo.dynamic_filtering_enable --eval.dataset example/test --eval.steps 20 \
          --data.prompt_dataset=example/train --data.label_key=solution --rollout.batch_size=16 --train.batch_size=64 \
          --algo.advantage.is_correction_level=token --algo.advantage.is_correction_mode=clip \
          --algo.advantage.is_correction_threshold 0.5 2.0
    """,
}


def converted(tmp_path: Path, name: str, text: str, *more: str, **options: Any) -> tuple[Conversion, Recipe]:
    """The conversion of a file, and the recipe as it is loaded."""
    path = tmp_path / name
    path.write_text("\n".join(line.removeprefix("        ") for line in text.splitlines()) + "\n")
    conversion = convert([str(path), *more], **options)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(conversion.recipe)
    return conversion, load_recipe(recipe)


@pytest.mark.parametrize("name", [*TRL, *VERL, *OPENRLHF])
def test_the_recipe_loads_and_accounts_for_every_argument(tmp_path: Path, name: str) -> None:
    text = {**TRL, **VERL, **OPENRLHF}[name]
    conversion, recipe = converted(tmp_path, name, text)
    assert recipe.model.name.startswith("example/")
    taken = set(conversion.draft.settings.used)
    left = [given for given in conversion.source.values if given not in taken]
    told = "\n".join([*conversion.draft.missing, *conversion.draft.ignored])
    told += "\n".join(entry.comment for entry in conversion.draft.fields.values())
    assert [given for given in left if given not in told] == []


def test_trl_grpo(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "grpo.yaml", TRL["grpo.yaml"])
    # 4 per device × 8 steps × 2 processes = 64 completions = 8 prompts × 8
    assert (recipe.sampling.prompts_per_step, recipe.sampling.group_size) == (8, 8)
    assert "4 per device × 8 accumulation steps × 2 processes = 64 completions" in conversion.recipe
    assert recipe.run.steps == 200  # 400 updates, two on each step's completions
    assert (recipe.run.name, recipe.run.trackers) == ("Qwen-GRPO", ["wandb"])
    method = recipe.method
    assert (method.aggregation, method.scale, method.kl_coef, method.inner_updates) == ("constant", "none", 0.01, 2)
    assert (method.clip_low, method.clip_high) == (0.2, 0.28)
    assert recipe.optimizer.learning_rate == 2e-6
    assert (recipe.optimizer.schedule, recipe.optimizer.warmup_ratio) == ("cosine", 0.1)
    assert recipe.reward.functions == [
        "trl.rewards:accuracy_reward", "trl.rewards:think_format_reward", "my_lib.rewards:short"]  # fmt: skip
    assert recipe.reward.weights == [1.0, 0.5, 0.1]
    assert recipe.task.options == {"name": "main"}
    assert conversion.draft.missing == ["entropy_coef = 0.01: the loss has no entropy term"]
    assert conversion.draft.to_fill == []


def test_trl_writes_its_own_defaults_out(tmp_path: Path) -> None:
    text = "model_name_or_path: example/m\ndataset_name: example/d\nreward_funcs: accuracy_reward\n"
    conversion, recipe = converted(tmp_path, "grpo.yaml", text)
    assert (recipe.method.aggregation, recipe.method.kl_coef) == ("token-mean", 0.0)
    assert recipe.method.advantage_epsilon == 1e-4
    assert (recipe.sampling.prompts_per_step, recipe.sampling.max_tokens) == (1, 512)
    assert (recipe.run.epochs, recipe.run.seed, recipe.optimizer.schedule) == (3.0, 42, "linear")
    assert "# TRL's default: loss_type = dapo" in conversion.recipe
    assert "do not say how many processes" in conversion.recipe
    _, eight = converted(tmp_path, "grpo.yaml", text, processes=8)
    assert eight.sampling.prompts_per_step == 8


def test_trl_cispo_and_several_updates_per_generation(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "cispo.yaml", TRL["cispo.yaml"])
    assert (recipe.method.surrogate, recipe.method.clip_low, recipe.method.clip_high) == ("clipped-weight", 1.0, 4.0)
    # 16 completions per update; 64 are sampled together
    assert (recipe.sampling.prompts_per_step, recipe.method.minibatches) == (4, 4)
    assert "16 completions per update, 4 updates per step = 4 prompts × 16 completions" in conversion.draft.remarks[0]


def test_trl_rloo(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "rloo_small.yaml", TRL["rloo_small.yaml"])
    assert (recipe.method.name, recipe.method.scale, recipe.method.kl_coef) == ("rloo", "batch", 0.05)
    assert recipe.method.inner_updates == 1
    assert {line.partition(" = ")[0] for line in conversion.draft.missing} == {"num_iterations", "reward_clip_range"}
    assert conversion.draft.to_fill[0].startswith("reward.functions")


def test_trl_dpo(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "dpo.yaml", TRL["dpo.yaml"])
    method = recipe.method
    assert (method.name, method.source, method.dpo_beta, method.aggregation) == (
        "dpo", "dataset", 0.05, "sequence-sum")  # fmt: skip
    assert recipe.sampling.prompts_per_step == 32
    assert recipe.model.lora is not None
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (32, 32.0)
    assert recipe.model.lora.targets == ["q_proj", "v_proj"]
    assert "there is no dropout" in conversion.draft.missing[0]


def test_trl_sft_on_several_datasets(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "sft.yml", TRL["sft.yml"])
    assert (recipe.method.name, recipe.method.aggregation) == ("sft", "token-mean")
    assert [(task.name, task.split, task.options) for task in recipe.mixture] == [
        ("example/chat", "train_sft", {}), ("example/code", None, {"name": "python"})]  # fmt: skip
    assert recipe.sampling.max_tokens == 4096
    assert any(line.startswith("assistant_only_loss") for line in conversion.draft.missing)


def test_trl_reward(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "reward.yaml", TRL["reward.yaml"])
    assert recipe.reward_model is not None
    assert (recipe.reward_model.learning_rate, recipe.reward_model.epochs, recipe.reward_model.batch_size) == (
        1e-4,
        2,
        8,
    )
    assert "labels" in conversion.draft.missing[0]


@pytest.mark.parametrize(
    ("loss", "aggregation"),
    [("grpo", "sequence-mean"), ("luspo", "sequence-sum"), ("dapo", "token-mean"), ("bnpo", "token-mean"),
     ("dr_grpo", "constant"), ("cispo", "token-mean")],
)  # fmt: skip
def test_losses_of_trl_are_averaged_as_in_gruppo_trl(tmp_path: Path, loss: str, aggregation: str) -> None:
    text = f"model_name_or_path: example/x\nloss_type: {loss}\nepsilon_high: 5.0"
    conversion, recipe = converted(tmp_path, "grpo.yaml", text)
    assert recipe.method.aggregation == aggregation
    args = GRPOConfig(loss_type=loss, epsilon_high=5.0, output_dir=str(tmp_path))
    assert recipe_of(args, Length(1, None), "example/x", None, False, 512)["method"]["aggregation"] == aggregation
    assert not any(line.startswith("loss_type") for line in conversion.draft.missing)


def test_a_bound_of_cispo_below_1_is_told(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "grpo.yaml", "model_name_or_path: example/x\nloss_type: cispo")
    assert recipe.method.clip_high == 0.0
    assert any(line.startswith("a largest ratio of 0.2: ") for line in conversion.draft.missing)


def test_the_passes_of_bnpo_are_told(tmp_path: Path) -> None:
    text = "model_name_or_path: example/x\nloss_type: bnpo\ngradient_accumulation_steps: 4"
    conversion, _ = converted(tmp_path, "grpo.yaml", text)
    assert any(line.startswith("loss_type = bnpo: TRL averages") for line in conversion.draft.missing)


def test_verl_grpo_script(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "run_grpo.sh", VERL["run_grpo.sh"])
    assert recipe.model.name == "example/qwen-3b"
    assert [task.name for task in recipe.mixture] == ["~/data/gsm8k/train.parquet", "~/data/math/train.parquet"]
    assert (recipe.sampling.prompts_per_step, recipe.sampling.group_size, recipe.method.minibatches) == (256, 5, 4)
    assert "256 prompts × rollout.n 5 completions, in 4 updates of ppo_mini_batch_size 64 prompts" in conversion.recipe
    assert recipe.run.trackers == ["wandb"]
    assert (recipe.method.kl_coef, recipe.method.kl_estimator) == (0.001, "k3")
    assert recipe.method.aggregation == "token-mean"
    assert recipe.optimizer.weight_decay == 0.01
    assert recipe.reward.functions == ["verl:rewards/judge.py:score"]
    assert recipe.run.name == "qwen-5"
    assert conversion.draft.to_fill == [
        "data.max_response_length: 1024 depends on LENGTH, which the script sets under a condition"]  # fmt: skip
    assert any("swap_space" in line for line in conversion.draft.ignored)


def test_verl_ppo_with_arrays(tmp_path: Path) -> None:
    _, recipe = converted(tmp_path, "run_ppo.sh", VERL["run_ppo.sh"])
    method = recipe.method
    assert (method.name, method.credit, method.baseline, method.scale) == ("ppo", "value", "batch", "batch")
    assert (method.kl_coef, method.kl_estimator) == (0.001, "k1")
    critic = recipe.critic
    assert (critic.name, critic.learning_rate, critic.clip, critic.gae_lambda) == ("example/critic", 2e-5, 0.5, 0.95)
    assert (recipe.run.steps, recipe.sampling.prompts_per_step) == (100, 64)


def test_verl_dapo(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "run_dapo.sh", VERL["run_dapo.sh"])
    method = recipe.method
    assert (method.clip_low, method.clip_high, method.dynamic_sampling_rounds) == (0.2, 0.28, 9)
    assert method.aggregation == "sequence-sum"
    assert recipe.reward.functions == ["verl:r.py:compute_score", "overlong"]
    assert recipe.reward.weights == [1.0, 0.5]
    assert recipe.reward.options == {"overlong": {"buffer_tokens": 512}}
    assert any("clip_ratio_c = 10.0" in line for line in conversion.draft.missing)


def test_verl_yaml_with_references_and_overrides(tmp_path: Path) -> None:
    _, recipe = converted(tmp_path, "rloo.yaml", VERL["rloo.yaml"], "actor_rollout_ref.rollout.n=6", "+trainer.x=1")
    assert (recipe.method.baseline, recipe.method.scale, recipe.method.surrogate) == (
        "leave-one-out",
        "none",
        "clipped",
    )
    assert (recipe.sampling.prompts_per_step, recipe.sampling.group_size, recipe.sampling.max_tokens) == (32, 6, 256)
    assert recipe.model.lora is not None
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (8, 16.0)
    assert recipe.run.checkpoint_every == 5


def test_openrlhf_with_names_of_today(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "t.sh", OPENRLHF["train_reinforce.sh"])
    method = recipe.method
    assert (method.baseline, method.scale, method.kl_estimator, method.kl_coef) == ("group", "batch", "k2", 1e-4)
    assert (method.clip_low, method.clip_high) == (0.2, 0.27)
    # 64 prompts × 8 = 512 completions, in updates of 256
    assert (recipe.sampling.prompts_per_step, recipe.sampling.group_size, recipe.method.minibatches) == (64, 8, 2)
    assert "in 2 updates" in conversion.recipe
    assert [(task.name, task.weight, task.system) for task in recipe.mixture] == [
        ("example/a", 0.7, ""), ("example/b", 0.3, "")]  # fmt: skip
    assert recipe.mixture[0].columns == {"prompt": "question"}
    assert recipe.reward.options == {"classifier": {"model": "example/rm-8b"}}
    assert (recipe.optimizer.schedule, recipe.optimizer.beta2, recipe.optimizer.warmup_ratio) == (
        "constant",
        0.95,
        0.03,
    )


def test_openrlhf_with_names_of_before(tmp_path: Path) -> None:
    conversion, recipe = converted(tmp_path, "train_old.sh", OPENRLHF["train_old.sh"])
    assert recipe.task.name == "data/prompts.jsonl"
    assert recipe.task.columns == {"prompt": "text"}
    assert (recipe.method.name, recipe.method.inner_updates, recipe.method.kl_coef) == ("ppo", 2, 0.02)
    assert recipe.critic.learning_rate == 9e-6
    assert (recipe.sampling.max_tokens, recipe.task.max_prompt_tokens) == (512, 1024)
    assert recipe.run.name == "llama-rlhf"
    assert (recipe.reward.functions, recipe.reward.options["remote"]["url"]) == (
        ["remote"],
        "http://localhost:5000/get_reward",
    )
    assert any(line.startswith("normalize_reward") for line in conversion.draft.missing)


@pytest.mark.parametrize(
    ("kind", "more", "field", "value"),
    [
        (VERL, "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True", "optimizer.state", "cpu"),
        (VERL, "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False", "optimizer.state", "float32"),
        (VERL, "actor_rollout_ref.actor.optim.optimizer=AdamW8bit", "optimizer.state", "8bit"),
        (VERL, "actor_rollout_ref.rollout.gpu_memory_utilization=0.6", "engine.memory", 0.3),
        (OPENRLHF, "--ds.adam_offload", "optimizer.state", "cpu"),
        (OPENRLHF, "--ds.lora.rank 8 --ds.load_in_4bit", "model.lora.base", "4bit"),
    ],
)
def test_memory_of_verl_and_openrlhf(kind: Mapping[str, str], more: str, field: str, value: Any) -> None:
    start = "python3 -m verl.trainer.main_ppo data.train_files=a.parquet actor_rollout_ref.model.path=example/m"
    if kind is OPENRLHF:
        start = (
            "python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path example/m --data.prompt_dataset example/d"
        )
    conversion = convert(shlex.split(f"{start} {more}"))
    found: Any = load_recipe(conversion.draft.data())
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert not any("optimizer" in told or "4bit" in told for told in conversion.draft.missing)


def test_openrlhf_dr_grpo(tmp_path: Path) -> None:
    _, recipe = converted(tmp_path, "d.sh", OPENRLHF["train_dr_grpo.sh"])
    method = recipe.method
    assert (method.scale, method.kl_coef, method.tis_cap, method.dynamic_sampling_rounds) == ("none", 0.0, 2.0, 9)
    assert recipe.evaluation is not None
    assert (recipe.evaluation.every, recipe.evaluation.samples, recipe.evaluation.decoding.temperature) == (20, 4, 0.6)


def test_a_command_line_in_place_of_a_file() -> None:
    words = ["python", "-m", "openrlhf.cli.train_ppo_ray", "--actor.model_name_or_path", "example/x"]
    assert 'name = "example/x"' in convert(words).recipe
    assert convert([" ".join(words)]).draft.value("model.name") == "example/x"
    assert convert(["data.train_batch_size=8", "actor_rollout_ref.model.path=example/y"]).source.trainer == "verl"
    launched = convert(["accelerate", "launch", "--num_processes", "4", "grpo.py", "--learning_rate", "1e-5"])
    assert (launched.source.trainer, launched.source.processes) == ("TRL", 4)


def test_a_command_may_name_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model_name_or_path: example/m\nlearning_rate: 1e-5\n")
    script = "torchrun --nproc_per_node=2 train_dpo.py --config config.yaml --learning_rate 3e-6\n"
    conversion, recipe = converted(tmp_path, "go.sh", script.replace("train_dpo.py", "dpo.py"))
    assert (recipe.model.name, recipe.optimizer.learning_rate) == ("example/m", 3e-6)
    assert recipe.sampling.prompts_per_step == 16
    assert conversion.source.method == "dpo"


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("scale_rewards: true", "method.scale", "group"),
        ("scale_rewards: batch", "method.scale", "batch"),
        ("warmup_steps: 0.05", "optimizer.warmup_ratio", 0.05),
        ("warmup_steps: 20", "optimizer.warmup_steps", 20),
        ("loss_type: grpo", "method.aggregation", "sequence-mean"),
        ("importance_sampling_level: sequence", "method.ratio", "sequence"),
        ("mask_truncated_completions: true", "method.mask_truncated", True),
        ("temperature: '0.7'", "sampling.temperature", 0.7),
        ("weight_decay: 0.1", "optimizer.weight_decay", 0.1),
        ("max_prompt_length: 512", "task.overlong", "filter"),
        ("adam_beta2: 0.99", "optimizer.beta2", 0.99),
        ("optim: paged_adamw_8bit", "optimizer.state", "8bit"),
        ("optim: adamw_torch", "optimizer.state", "float32"),
        ("bf16_full_eval: true", "optimizer.state", "float32"),
        ("vllm_gpu_memory_utilization: 0.4", "engine.name", "native"),
        ("use_vllm: true", "engine.name", "native"),
        ("{use_peft: true, lora_dropout: 0, load_in_4bit: true, bnb_4bit_quant_type: fp4}", "model.lora.base", "4bit"),
    ],
)
def test_single_values_of_trl(tmp_path: Path, line: str, field: str, value: Any) -> None:
    lines = line.strip("{}").replace(", ", "\n")
    text = f"model_name_or_path: example/m\nnum_generations: 8\n{lines}\n"
    conversion, recipe = converted(tmp_path, "grpo.yaml", text)
    found: Any = recipe
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert conversion.draft.missing == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("loss_type: sapo", "no such loss"),
        ("top_p: 0.9", "evaluation.decoding.top_p"),
        ("delta: 4.0", "two bounds"),
        ("learning_rate: fast", "does not fit optimizer.learning_rate"),
        ("temperature: 0", "does not fit sampling.temperature"),
        ("frobnicate: 3", "does not know this name"),
        ("sync_ref_model: true", "run.iterations"),
        ("lora_bias: all", "plain LoRA"),
        ("fp16: true", "float16"),
        ("load_in_4bit: true", 'model.lora.base = "4bit"'),
        ("optim: lion_8bit", "the optimizer is AdamW"),
    ],
)
def test_what_has_no_equivalent_is_said(tmp_path: Path, line: str, why: str) -> None:
    text = f"model_name_or_path: example/m\nnum_generations: 8\nuse_peft: {line.startswith('lora')}\n{line}\n"
    conversion, _ = converted(tmp_path, "grpo.yaml", text)
    assert any(why in told for told in conversion.draft.missing), conversion.draft.missing


def test_the_page_has_the_tables_and_examples_of_today() -> None:
    page = runpy.run_path("scripts/coming_from.py")["page"]()
    assert page == Path("docs/coming_from.md").read_text(encoding="utf-8"), "run `make coming-from`"
    assert page.count("```toml\n# Converted by") == 3
    for name in ("per_device_train_batch_size", "actor_rollout_ref.rollout.n", "rollout.n_samples_per_prompt"):
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("name", "text", "steps"),
    [
        ("grpo.yaml", "model_name_or_path: example/m\nnum_iterations: 4\nwarmup_steps: 20\n", 5),
        (
            "run.sh",
            "python -m verl.trainer.main_ppo actor_rollout_ref.model.path=example/m data.train_batch_size=512 "
            "actor_rollout_ref.actor.optim.lr_warmup_steps=10",
            10,
        ),
    ],
)
def test_warmup_is_counted_in_steps_of_the_recipe(tmp_path: Path, name: str, text: str, steps: int) -> None:
    _, recipe = converted(tmp_path, name, text)
    assert recipe.optimizer.warmup_steps == steps


def test_every_name_is_answered() -> None:
    fields = list(recipe_tables())
    for trainer, listed in names().items():
        assert len(listed) >= 3
        silent = [
            name for name in listed if not (gruppo_name(name.split(".")) or fields_named(name.split("."), fields))
        ]
        assert silent == [], trainer


def test_the_names_and_defaults_are_those_of_trl() -> None:
    library = pytest.importorskip("trl", reason="TRL is a test extra: make test installs it")
    known = names()
    common = {*known["training"]}
    for method, defaults in trl.DEFAULTS.items():
        config = getattr(library, {"sft": "SFTConfig", "reward": "RewardConfig"}.get(method, f"{method.upper()}Config"))
        fields = {field.name: field for field in dataclasses.fields(config)}
        assert fields.keys() <= common | {*known[method]}
        theirs = {
            name: field.default_factory() if callable(field.default_factory) else field.default
            for name, field in fields.items()
            if name in defaults
        }
        assert theirs == defaults, method
    model = {field.name: field.default for field in dataclasses.fields(library.ModelConfig)}
    assert {name: model[name] for name in trl.LORA} == trl.LORA
    assert model.keys() <= {*known["model"]}
    assert {field.name for field in dataclasses.fields(library.ScriptArguments)} <= {*known["script"]}


def test_the_defaults_of_verl_and_openrlhf_are_names_that_they_have() -> None:
    assert {*verl.DEFAULTS, *verl._LORA, *verl._CRITIC} <= {*names()["verl"]}
    ours = {*openrlhf.DEFAULTS, *openrlhf._CRITIC, *openrlhf._LORA, *openrlhf._EVALUATION}
    assert ours <= {*names()["openrlhf"]}


def test_the_names_and_defaults_are_those_of_verl() -> None:
    library = pytest.importorskip("verl", reason="verl is not installed; its names are in names.yaml")
    file = Path(library.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    flat: dict[str, Any] = {}

    def add(prefix: str, table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict) and value:
                add(f"{prefix}{key}.", value)
            elif key != "_target_":
                flat[f"{prefix}{key}"] = value

    add("", yaml.safe_load(file.read_text()))
    assert {*flat} <= {*names()["verl"]}
    for name, value in {**verl.DEFAULTS, **verl._LORA, **verl._CRITIC}.items():
        assert flat[name] == value, name


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 5000 values"),
        ("learning_rate: &a [*a]\n", "more than 5000 values|cannot be read"),
        ("learning_rate: !!python/object/apply:os.system ['true']\n", "cannot be read as plain YAML"),
        ("model_name_or_path: !env HOME\n", "cannot be read as plain YAML"),
        ("[" * 1500, "cannot be read|nested more than"),
        ("a: " + "[" * 100 + "]" * 100, "nested more than"),
        ("learning_rate: " + "9" * 300_000, "larger than"),
        ("learning_rate: " + "9" * 5000, "cannot be read as plain YAML"),
        ('run_name: "\\ud800"\n', "cannot be read as plain YAML"),
        ("- a\n- b\n", "must be a list of names"),
        ("", "must be a list of names"),
        ("colour: red\n", "no name of TRL or verl"),
        ("learning_rate: 1\n---\nlearning_rate: 2\n", "cannot be read as plain YAML"),
        ("learning_rate: 1e-5\n", "source="),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"model_name_or_path: a\x00b\n", "not text"),
    ],
)
def test_hostile_yaml(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message):
        convert([str(path)])


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo hello\n", "starts no training"),
        ("python -m verl.trainer.main_ppo a='b\n", "not closed"),
        ("python -m openrlhf.cli.train_dpo --a 1\n", "train_ppo_ray only"),
        ("x" * 100_000, "larger than"),
        (
            "A=" + "x" * 1000 + "\n" + "".join(f"{n}=${b}${b}${b}${b}\n" for b, n in zip("ABCDEFGHIJ", "BCDEFGHIJK")),
            "more than a million",
        ),
    ],
)
def test_hostile_scripts(tmp_path: Path, script: str, message: str) -> None:
    path = tmp_path / "x.sh"
    path.write_text(script)
    with pytest.raises(UsageError, match=message):
        convert([str(path)])


PIECES = ['"', "'", "$(", "${", "}", ")", "\\", "\n", "#", "`", "$((", "))", "*", "&a ", "!!", "[", "]", "{", ": ",
          "-1", "1e999", ".nan", "null", "\u202e", "\x7f", "=", "<<EOF", "if", "fi", "=(", "2001-01-01"]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_are_converted_or_refused_in_words(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for name, original in {**TRL, **VERL, **OPENRLHF}.items():
        text = original
        for _ in range(chance.randint(1, 6)):
            start, kind = chance.randrange(len(text)), chance.random()
            length = 0 if kind < 0.4 else chance.randint(1, 30)
            text = text[:start] + (chance.choice(PIECES) if kind < 0.8 else "") + text[start + length :]
        path = tmp_path / name
        path.write_text(text)
        try:
            conversion = convert([str(path)])
        except UsageError:
            continue
        data = tomllib.loads(conversion.recipe)
        assert not recipe_mistakes(data) or conversion.draft.to_fill


def test_nothing_of_a_script_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"""
        X=$(touch {mark}); Y=`touch {mark}`; Z=$((touch {mark})); eval "touch {mark}"
        trap "touch {mark}" EXIT
        python -m verl.trainer.main_ppo actor_rollout_ref.model.path=example/$X$Y trainer.total_epochs=$((2**3)) \\
            data.train_batch_size=$(nproc) <(touch {mark})
    """
    conversion, _ = converted(tmp_path, "x.sh", script.replace("example/$X$Y", "example/m$X$Y"))
    assert not mark.exists()
    told = "\n".join(conversion.draft.to_fill)
    assert "actor_rollout_ref.model.path" in told
    assert "trainer.total_epochs" in told
    assert "data.train_batch_size" in told


@pytest.mark.parametrize("value", ['"\\n[run]\\nsteps = 1"', "'it''s'", '"# x"', '"\\x1b[31m"', '"\\u202e"', "'a\"b'"])
def test_values_cannot_leave_their_place(tmp_path: Path, value: str) -> None:
    text = (
        f"model_name_or_path: example/m\nnum_generations: 8\nrun_name: {value}\nfoo: {value}\ndataset_name: {value}\n"
    )
    conversion, recipe = converted(tmp_path, "grpo.yaml", text)
    assert recipe.run.steps == 100
    assert recipe.task.name == yaml.safe_load(value)
    assert all(line.isprintable() for line in conversion.recipe.splitlines() if line.startswith("#"))
    assert tomllib.loads(conversion.recipe)["task"]["name"] == yaml.safe_load(value)

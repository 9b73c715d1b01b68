"""The recipe as a whole: its tables, and the checks that involve several of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import tomli_w
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from gruppo.config.cluster_section import LOCAL, Cluster
from gruppo.config.engine_section import Engine
from gruppo.config.inheritance import with_inherited
from gruppo.config.method_section import Critic, Method
from gruppo.config.schedule import steps_of_epochs
from gruppo.config.sections import (
    Audit,
    Benchmark,
    Environment,
    Evaluation,
    Model,
    Optimizer,
    Reward,
    RewardModel,
    Run,
    Sampling,
    Section,
    Task,
)
from gruppo.config.unused import unused_fields


class Recipe(Section):
    """Everything that determines what a run computes."""

    run: Run = Run()
    model: Model
    task: Task = Task()
    """The single task of the run."""
    mixture: list[Task] = []  # noqa: RUF012  pydantic copies it
    """Several tasks, sampled by their weights, in place of [task]."""
    reward: Reward = Reward()
    reward_model: RewardModel | None = None
    environment: Environment | None = None
    audit: Audit | None = None
    method: Method = Method()
    critic: Critic = Critic()
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation | None = None
    benchmarks: list[Benchmark] = []  # noqa: RUF012
    """Additional tasks, evaluated during training or by `gruppo eval --recipe`."""
    cluster: Cluster | None = None

    @model_validator(mode="before")
    @classmethod
    def _evaluations_inherit(cls, data: Any) -> Any:
        return with_inherited(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Raise ValueError if fields of different tables disagree."""
        if self.run.epochs is None and self.optimizer.warmup_steps > self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps}: must be at most run.steps = "
                f"{self.run.steps}; write fewer warm-up steps or more steps"
            )
        if self.mixture and "task" in self.model_fields_set:
            raise ValueError("[task] and [[mixture]] both define the source of prompts; write only one of them")
        self._evaluations_agree()
        self._iterations_agree()
        self._environment_agrees()
        self._cluster_agrees()
        if self.method.credit == "pair" and self.method.source != "dataset" and self.sampling.group_size < 2:
            raise ValueError(
                'sampling.group_size = 1: method.credit = "pair" needs a correct and an incorrect completion per '
                "prompt; write group_size = 2 or more"
            )
        if self.method.baseline == "leave-one-out" and self.sampling.group_size < 2:
            raise ValueError(
                'sampling.group_size = 1: method.baseline = "leave-one-out" needs other completions in the group; '
                "write group_size = 2 or more"
            )
        most = self.sampling.prompts_per_step * (1 if self.method.source == "dataset" else self.sampling.group_size)
        if self.method.minibatches > most:
            raise ValueError(
                f"method.minibatches = {self.method.minibatches}: a step has only {most} completions "
                "(sampling.prompts_per_step × sampling.group_size) to split; write fewer minibatches"
            )
        for table, field, message in unused_fields(self):
            raise PydanticCustomError("unused_field", "{message}", {"message": message, "field": [table, field]})

    def _evaluations_agree(self) -> None:
        """Check the fields of [evaluation] and [[benchmarks]]. Raises ValueError if they disagree."""
        sections = [("evaluation", self.evaluation)] if self.evaluation else []
        sections += [(f"benchmarks[{index}]", benchmark) for index, benchmark in enumerate(self.benchmarks)]
        for field, settings in sections:
            if settings.samples > 1 and not settings.decoding.temperature:
                raise ValueError(
                    f"{field}.samples = {settings.samples}: greedy answers are all identical; write a temperature in "
                    f"[{field}.decoding], or samples = 1"
                )
        titles = [benchmark.title for benchmark in self.benchmarks]
        if duplicates := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f'benchmarks: two have the name "{duplicates[0]}"; give one of them another name')

    def _environment_agrees(self) -> None:
        """Check the fields that depend on an environment. Raises ValueError if they disagree."""
        if self.environment is None:
            return
        if self.method.source == "dataset":
            raise ValueError('[environment]: method.source = "dataset" samples nothing; leave the table out')
        if self.reward_model is not None:
            raise ValueError(
                "[environment]: the labels of a [reward_model] come from completions sampled without an environment; "
                "leave one of the two tables out"
            )

    def _cluster_agrees(self) -> None:
        """Check the fields that several ranks, several engines or sampling ahead do not support. Raises ValueError if
        one is set."""
        if self.cluster is None:
            return
        if self.cluster.lag:
            self._lag_agrees(self.cluster)
        lora, ranks, engines = self.model.lora, self.cluster.trainers > 1, self.cluster.engines
        for field, value, only, applies, what in (
            ("engine.name", self.engine.name, "native", ranks and not engines, "several ranks without cluster.engines"),
            ("optimizer.state", self.optimizer.state, "float32", ranks, "several ranks"),
            ("model.lora.base", lora.base if lora else "full", "full", ranks or engines, "several ranks or engines"),
            ("method.source", self.method.source, "policy", engines and self.method.source == "initial", "engines"),
        ):
            if applies and value != only:
                raise ValueError(f'{field} = "{value}": not supported with {what}; write "{only}", or change [cluster]')
        if engines and self.model.trust_remote_code:
            raise ValueError(
                f"cluster.engines = {engines}: does not run Python files that come with a model "
                "(model.trust_remote_code); write engines = 0"
            )
        if self.cluster.engine_devices > 1 and self.engine.name != "vllm":
            raise ValueError(
                f'cluster.engine_devices = {self.cluster.engine_devices}: engine.name = "{self.engine.name}" computes '
                'on one device; write engine_devices = 1 and more engines, or engine.name = "vllm"'
            )

    def _lag_agrees(self, cluster: Cluster) -> None:
        """Check the fields that sampling ahead depends on. Raises ValueError if one does not fit."""
        method, scorer, lag = self.method, self.reward_model, f"cluster.lag = {cluster.lag}"
        if method.source != "policy":
            raise ValueError(
                f'{lag}: method.source = "{method.source}" does not sample from the policy that is trained, so nothing '
                "has to wait for its weights; write lag = 0"
            )
        if not method.tis_cap:
            trainer = ' and old_logprobs = "trainer"' if method.old_logprobs == "engine" else ""
            raise ValueError(
                f"{lag}: completions are sampled by weights of up to {cluster.lag} steps before, which truncated "
                f"importance weights have to correct; write method.tis_cap = 2.0{trainer}, or lag = 0"
            )
        if scorer is not None and scorer.prompts and self.run.iterations > 1:
            raise ValueError(
                f"{lag}: steps would be scored ahead by a reward model that run.iterations = {self.run.iterations} "
                "trains again in between; write lag = 0, run.iterations = 1, or reward_model.prompts = 0"
            )
        if scorer is not None and cluster.trainers > 1:
            raise ValueError(
                f"{lag}: a [reward_model] is sharded over the cluster.trainers = {cluster.trainers} ranks, which are "
                "busy training while a step is scored ahead; write lag = 0, or trainers = 1"
            )
        if self.model.lora is not None and self.model.lora.base == "4bit":
            raise ValueError(
                f'{lag}: sampling ahead needs copies of the merged weights, which model.lora.base = "4bit" cannot '
                'hold; write base = "full", or lag = 0'
            )

    def _iterations_agree(self) -> None:
        """Check the fields of iterations, reward model and audit. Raises ValueError if they disagree."""
        iterations, model, method = self.run.iterations, self.reward_model, self.method
        if self.run.epochs is None and self.run.steps % iterations:
            raise ValueError(
                f"run.iterations = {iterations}: run.steps = {self.run.steps} cannot be split into as many equal "
                f"parts; write e.g. steps = {iterations * max(1, self.run.steps // iterations)}"
            )
        if iterations > 1 and method.source != "policy":
            raise ValueError(
                f'run.iterations = {iterations}: method.source = "{method.source}" does not sample from the current '
                "policy; write iterations = 1"
            )
        if self.model.lora is not None and self.model.lora.base == "4bit" and self.model.dtype == "float64":
            raise ValueError('model.lora.base = "4bit": does not compute in float64; write model.dtype = "auto"')
        if iterations > 1 and self.model.lora is not None:
            raise ValueError(
                f"run.iterations = {iterations}: with adapters, the reference is the model without them and cannot be "
                "reset to the policy; write iterations = 1, or leave [model.lora] out"
            )
        if method.source == "dataset":
            for name, table in (("reward_model", model), ("audit", self.audit)):
                if table is not None:
                    raise ValueError(f'[{name}]: method.source = "dataset" scores nothing; leave the table out')
        if model is not None and (model.kind == "process") != (method.credit == "step"):
            fix = (
                'write method.name = "grpo-process"'
                if model.kind == "process"
                else 'write kind = "process", or another method'
            )
            raise ValueError(f'reward_model.kind = "{model.kind}": method.credit = "{method.credit}"; {fix}')

    def to_toml(self) -> str:
        """The resolved recipe as TOML, with the value of every field. Loading it again gives an equal recipe."""
        return tomli_w.dumps(self.as_mapping())

    def as_mapping(self) -> dict[str, Any]:
        """Tables and fields as plain values. Loading them again gives an equal recipe."""
        excluded: dict[str, Any] = {"task" if self.mixture else "mixture": True}
        excluded |= {"run": self.run.replaced, "optimizer": self.optimizer.replaced}
        return self.model_dump(exclude_none=True, exclude=excluded)

    def with_steps(self, prompts: int) -> Self:
        """The recipe with run.steps in place of run.epochs, for a run on `prompts` training prompts.

        Raises ValueError if other fields do not fit this number of steps.
        """
        if self.run.epochs is None:
            return self
        steps = steps_of_epochs(self.run, prompts, self.sampling.prompts_per_step)
        run = self.run.model_copy(update={"steps": steps, "epochs": None})
        resolved = self.model_copy(update={"run": run})
        resolved._check()
        return resolved

    def on_ranks(self, size: int) -> Self:
        """The recipe on another number of ranks."""
        if self.cluster is None or size == self.cluster.trainers:
            return self
        changes: dict[str, Any] = {"trainers": size}
        if size == 1 or (self.cluster.shards and size % self.cluster.shards):
            changes["shards"] = 0
        if size == 1 and not self.cluster.engines:
            changes["address"] = LOCAL
        return self.model_copy(update={"cluster": self.cluster.model_copy(update=changes)})

    @property
    def lag(self) -> int:
        """Steps that sampling may be ahead of training."""
        return 0 if self.cluster is None else self.cluster.lag

    @property
    def tasks(self) -> list[Task]:
        """The tasks that prompts come from: the mixture, or the single task."""
        return self.mixture or [self.task]

"""TODO."""

from __future__ import annotations

from typing import Any, Self

import tomli_w
from pydantic import model_validator

from gruppo.config.method_section import Critic, Method
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


class Recipe(Section):
    """All that decides what a run computes."""

    run: Run = Run()
    model: Model
    task: Task = Task()
    """The task, where there is one."""
    mixture: list[Task] = []  # noqa: RUF012  pydantic copies it
    """Several tasks, drawn from by their weights, in place of [task]."""
    reward: Reward = Reward()
    reward_model: RewardModel | None = None
    environment: Environment | None = None
    audit: Audit | None = None
    method: Method = Method()
    critic: Critic = Critic()
    sampling: Sampling = Sampling()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation | None = None
    benchmarks: list[Benchmark] = []  # noqa: RUF012
    """More tasks to be evaluated on while training, or by `gruppo eval --recipe`."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.optimizer.warmup_steps > self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is more than run.steps = {self.run.steps}; "
                "write a smaller warm-up or more steps"
            )
        if self.mixture and "task" in self.model_fields_set:
            raise ValueError("[task] and [[mixture]] both say where questions come from; write one of them")
        self._exams_agree()
        self._rounds_agree()
        self._environment_agrees()
        if self.method.source == "dataset" and self.reward.functions:
            raise ValueError(
                f'reward.functions = {self.reward.functions}: method.source = "dataset" scores nothing; remove it'
            )
        if self.method.credit == "pair" and self.method.source != "dataset" and self.sampling.group_size < 2:
            raise ValueError(
                'sampling.group_size = 1: method.credit = "pair" needs a right and a wrong completion of a question; '
                "write group_size = 2 or more"
            )
        if self.method.baseline == "leave-one-out" and self.sampling.group_size < 2:
            raise ValueError(
                'sampling.group_size = 1: method.baseline = "leave-one-out" compares with the other completions of a '
                "group; write group_size = 2 or more"
            )
        return self

    def _exams_agree(self) -> None:
        """Fields of what is evaluated. Raises ValueError."""
        asked = [("evaluation", self.evaluation)] if self.evaluation else []
        asked += [(f"benchmarks[{place}]", each) for place, each in enumerate(self.benchmarks)]
        for field, settings in asked:
            if settings.samples > 1 and not settings.decoding.temperature:
                raise ValueError(
                    f"{field}.samples = {settings.samples}: greedy answers are all the same; write a temperature in "
                    f"[{field}.decoding], or samples = 1"
                )
        titles = [each.title for each in self.benchmarks]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f'benchmarks: two are called "{twice[0]}"; give one of them another name')

    def _environment_agrees(self) -> None:
        """Fields that go together with an environment. Raises ValueError."""
        if self.environment is None:
            return
        if self.method.source == "dataset":
            raise ValueError('[environment]: method.source = "dataset" samples nothing; leave the table out')
        if self.reward_model is not None:
            raise ValueError(
                "[environment]: a [reward_model] is labelled by completions that are sampled without it; leave one of "
                "the two tables out"
            )

    def _rounds_agree(self) -> None:
        """Fields of iterations, of the reward model and of the audit. Raises ValueError."""
        rounds, model, method = self.run.iterations, self.reward_model, self.method
        if self.run.steps % rounds:
            raise ValueError(
                f"run.iterations = {rounds}: run.steps = {self.run.steps} cannot be cut into as many equal rounds; "
                f"write e.g. steps = {rounds * max(1, self.run.steps // rounds)}"
            )
        if rounds > 1 and method.source != "policy":
            raise ValueError(
                f'run.iterations = {rounds}: method.source = "{method.source}" does not sample from the policy; write 1'
            )
        if rounds > 1 and self.model.lora is not None:
            raise ValueError(
                f"run.iterations = {rounds}: the reference of adapters is the model without them and cannot become "
                "the policy; write iterations = 1, or leave [model.lora] out"
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
        """The resolved recipe, every field with its value; reading it again gives an equal recipe."""
        return tomli_w.dumps(self.as_mapping())

    def as_mapping(self) -> dict[str, Any]:
        """Tables and fields as plain values; reading them again gives an equal recipe."""
        return self.model_dump(exclude_none=True, exclude={"task" if self.mixture else "mixture"})

    @property
    def tasks(self) -> list[Task]:
        """Where questions come from: the mixture, or the one task."""
        return self.mixture or [self.task]

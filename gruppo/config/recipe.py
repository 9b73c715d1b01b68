"""The recipe: everything that decides what a run computes. TOML in, resolved TOML out.

Frozen and validated where it is read; no torch here, so that a wrong recipe is refused in a moment. What depends on
the machine (micro-batch, slots, dtype behind "auto") is not a field: it is chosen once, written to the run folder's
`environment.json` and kept.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from gruppo.config.methods import METHODS
from gruppo.errors import UsageError, nearest, one_line
from gruppo.utils.paths import is_file, user_path

Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Field(allow_inf_nan=False)


class RecipeError(UsageError):
    """A recipe that cannot be run; the message names file, field, value and fix, a line for each."""

    def __init__(self, *mistakes: object) -> None:
        ValueError.__init__(self, "\n".join(map(one_line, mistakes)))


# The policy terms by name; `method.surrogate` also takes an import path.
SURROGATES = {
    "clipped": "gruppo.algorithms.losses:clipped",
    "clipped-weight": "gruppo.algorithms.losses:clipped_weight",
    "log-likelihood": "gruppo.algorithms.losses:log_likelihood",
}


class Section(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


_UNITS = {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    if prefix or unit == "B"
}


def as_bytes(text: str) -> int:
    """A size such as "6 GB" (10⁹ bytes) or "5.5 GiB" (2³⁰) in bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    size = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise PydanticCustomError("memory", "must be a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return size


def share_or_size(value: Any) -> Any:
    """The value, where it is a share of a memory or a size that `as_bytes` reads."""
    if isinstance(value, str):
        as_bytes(value)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PydanticCustomError("memory", "must be a share (more than 0, at most 1) or a size such as '6 GB'")
    return value


class Run(Section):
    """What the run is called, how long it is, and when it is saved."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Name of the run; its folder is runs/<name> unless --out says otherwise. Default: the recipe's file name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the order of the questions and every sampled token."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Steps; in each, a batch of questions is drawn, sampled, scored and learned from."""
    iterations: Annotated[int, Field(ge=1)] = 1
    """I of Algorithm 1: the steps are cut into so many equal rounds. At the start of each the reference becomes the
    policy, and a [reward_model] is trained on new samples."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 10
    """Steps between checkpoints. The last two and the best are kept; the last step always makes one."""
    memory: float | str = 0.6
    """What the process may hold at its peak: a share of the memory that is free when the run begins, or so much of it:
    "6 GB", "5.5 GiB". Micro-batch and slots are chosen by it, once; no result depends on them but by rounding."""

    _checked_memory = field_validator("memory", mode="before")(share_or_size)

    @field_validator("name")
    @classmethod
    def _name_of_no_device(cls, name: str) -> str:
        if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", name):
            raise PydanticCustomError("name", "must be a name that a folder can have everywhere")
        return name


class Lora(Section):
    """Low-rank adapters (LoRA, through peft) in place of full fine-tuning: W + alpha/rank · B·A, where A and B alone
    are trained. There is no dropout on them: what samples and what is trained is one distribution."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which layers: "all-linear" for every linear layer but the output head (experts that are no linear layers stay as
    they are), or the ends of their names, such as ["q_proj", "v_proj"]."""

    @model_validator(mode="before")
    @classmethod
    def _targets_are_names(cls, data: Any) -> Any:
        targets = data.get("targets", "all-linear") if isinstance(data, Mapping) else "all-linear"
        listed = isinstance(targets, list) and targets and all(isinstance(each, str) and each for each in targets)
        if targets != "all-linear" and not listed:
            raise ValueError(
                f'targets = {targets!r}: neither "all-linear" nor a list of names; write e.g. ["q_proj", "v_proj"]'
            )
        return data


class Model(Section):
    """Where the policy's weights come from, and where and how they are computed with."""

    name: Annotated[str, Field(min_length=1)]
    """A Hugging Face hub name, a local folder, a GGUF file, or an alias ("smollm2-135m-instruct")."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; "auto" takes cuda, then mps, then cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision of matrix products; "auto" is bfloat16 where the processor has it. Weights, gradients and optimizer
    state are float32 (float64 with "float64", which is for proofs)."""
    trust_remote_code: bool = False
    """Run the Python files that come with model.name. They can do whatever you can: read them first."""
    lora: Lora | None = None
    """Train adapters alone; leave the table out to train all weights."""


class Task(Section):
    """Where questions come from, and how a row becomes a prompt."""

    name: Annotated[str, Field(min_length=1)] = "arithmetic"
    """"arithmetic", a benchmark by name ("gsm8k", "math", …), "reasoning-gym/NAME", a file (.jsonl, .json, .csv,
    .parquet), a folder saved by datasets, a data set of the Hugging Face hub ("owner/name"), or
    "package.module:function"."""
    options: dict[str, Any] = {}
    """Options of the task itself, passed on by name (for arithmetic: maximum, held_out, negative; for reasoning-gym:
    size, seed and those of the data set; for a benchmark: data, prompt, shots, format; for a data set of the hub: name,
    revision)."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Which part of a data set with several ("train", "test", …); by default "train", for evaluation "test"."""
    columns: dict[str, str] = {}
    """Our names of columns and theirs: `{prompt = "question", answer = "solution"}`. Others keep their names."""
    template: str | None = None
    """Text of the prompt with columns in braces: "{question} Think first." Double braces are braces."""
    system: str | None = None
    """Turn a text prompt into a conversation with this system message; "" makes a conversation without one."""
    completion: str | None = None
    """Text of the completion with columns in braces, for methods that learn from rows: "The answer is {answer}."."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the rows that is kept from training, chosen by a hash of their prompts; evaluation asks those."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of a prompt; by default what the model's context leaves beside the completion."""
    overlong: Literal["refuse", "filter"] = "refuse"
    """What to do with longer prompts: refuse the recipe, or leave them out with a count. None is ever cut."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """In a mixture, how often this task is drawn from, relative to the others."""


class Reward(Section):
    """How completions are scored."""

    functions: list[str] = []
    """Reward functions: built-in names (gruppo.rewards.REWARDS), "package.module:function" or "file.py:function"; with
    "verl:" or "verifiers:" before the path, functions of their signatures."""
    weights: list[float] = []
    """One weight for each function, in the same order. Default: 1 for each."""
    options: dict[str, dict[str, Any]] = {}
    """Keyword arguments of functions, by the name in `functions`: `options.regex.pattern = "\\\\d+"`."""
    timeout: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that one call (one function, one group) may take before its process is killed and the group abstains."""
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Processes that run reward functions side by side."""
    failure_limit: Fraction = 0.2
    """Share of a step's completions that may abstain because a reward failed; when it is more the run stops, is saved,
    and says why. 1 never stops."""
    memory: float | str = 0.5
    """What these processes may hold together, each an equal part: a share of the machine's memory, or so much of it:
    "4 GB". An allocation beyond it fails in the reward, and its call abstains."""
    environment: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = []
    """Names of environment variables that rewards need, such as ["OPENAI_API_KEY"]; of the others they get those that
    say where programs, libraries and caches are, and no secrets."""

    _checked_memory = field_validator("memory", mode="before")(share_or_size)

    @model_validator(mode="after")
    def _lists_fit(self) -> Self:
        if self.weights and self.functions and len(self.weights) != len(self.functions):
            raise ValueError(
                f"weights = {self.weights} has {len(self.weights)} numbers for {len(self.functions)} functions; "
                "write one weight for each function, or leave weights out"
            )
        for name in self.options if self.functions else ():
            if name not in self.functions:
                raise ValueError(
                    f"options.{name} = {self.options[name]}: no such function in reward.functions"
                    f"{nearest(name, self.functions)}"
                )
        return self


class RewardModel(Section):
    """A trained model that judges completions beside, or in place of, reward functions (whose weights may be 0). Its
    labels come from reward.functions: a completion is right where the first of them gives more than method.right."""

    kind: Literal["outcome", "process"] = "outcome"
    """One probability for a completion, or one for each of its steps (then method.credit = "step")."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Where its weights come from, as model.name, or the folder of a reward model; by default the policy's start
    weights. A new head begins at 0."""
    weight: float = 1.0
    """Its weight in the reward, beside reward.weights."""
    prompts: Annotated[int, Field(ge=0)] = 64
    """Questions whose completions, sampling.group_size each, are sampled and labelled before the first step and at the
    start of each later iteration, to train it on; 0 leaves it as it is."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of these questions that it is not trained on, but measured by, before and after."""
    learning_rate: Annotated[float, Field(ge=0)] = 2e-5
    """Of its AdamW, constant; all else is as in [optimizer]."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over its training set in each round."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Completions an update."""
    history: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a round's training set that is drawn from the samples of earlier rounds."""
    history_capacity: Annotated[int, Field(ge=0)] = 10_000
    """How many of the latest earlier samples are drawn from."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides what is held out, what is drawn from history, and the order of training."""
    split: Annotated[str, Field(min_length=1)] = "lines"
    """Steps of a completion: its "lines", or "package.module:function", text -> the ends of steps in characters."""
    continuations: Annotated[int, Field(ge=1)] = 4
    """N, completions sampled from the end of each step to label it (Math-Shepherd)."""
    labels: Literal["hard", "soft"] = "hard"
    """Of a step: 1 if any of its continuations is right, or the share of them that is."""


class Environment(Section):
    """What answers the model while it writes a completion: Python that it writes is run, or a class plays a part, turn
    by turn. Answers are read by the model and carry no loss. Leave the table out for none. See docs/environments.md."""

    name: Annotated[str, Field(min_length=1)]
    """"python" (blocks of Python are run in a sandbox and their output follows), "package.module:Class" or
    "file.py:Class": a class of ours (reset, step) or of TRL's (reset, tools as methods)."""
    options: dict[str, Any] = {}
    """Keyword arguments that the class is made with, for every completion anew."""
    turns: Annotated[int, Field(ge=1)] = 4
    """How often it answers at the most; what the model writes after the last answer ends the completion."""
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds that one answer may take: a block of Python (also of processor time), or one call of a class."""
    memory: str = "512 MiB"
    """What a sandbox, or a process that holds objects of the class, may hold."""
    output: Annotated[int, Field(ge=1)] = 2000
    """Characters of an answer that the model is given; more is cut, with a note."""
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Answers that are made side by side: sandboxes, or processes with objects of the class."""
    weight: float = 1.0
    """Weight of the class's get_reward() in the reward, where it has one, beside reward.weights."""
    run_model_code_WITHOUT_A_SANDBOX: bool = False  # noqa: N815  as ugly as what it does
    """Run what the model writes as you, with all that you can do. Only on a machine that has nothing to lose."""

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, memory: str) -> str:
        as_bytes(memory)
        return memory

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.name != "python" and ":" not in self.name:
            raise ValueError(
                f'name = "{self.name}": unknown environment; write "python", "package.module:Class" or "file.py:Class"'
            )
        if self.name == "python" and self.options:
            raise ValueError(f'options = {self.options}: name = "python" has none; remove them')
        if self.name != "python" and self.run_model_code_WITHOUT_A_SANDBOX:
            raise ValueError(
                f'run_model_code_WITHOUT_A_SANDBOX = true: name = "{self.name}" runs no code of the model; remove it'
            )
        return self


class Audit(Section):
    """A second grader that judges a sample of the completions, and trains nothing: an alarm when the reward rises and
    its verdict does not (DeepSeekMath §5.2.3). Leave the table out for none."""

    function: Annotated[str, Field(min_length=1)]
    """As in reward.functions; another one than the run is trained on."""
    options: dict[str, Any] = {}
    """Its keyword arguments."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each step's groups that it judges, at least one."""
    window: Annotated[int, Field(ge=4)] = 10
    """Steps that a rise is looked for over."""


class Method(Section):
    """The objective. A method is a row of defaults for the other fields; what a recipe writes itself goes first."""

    name: str = "grpo"
    """A row of gruppo.config.methods.METHODS (`gruppo methods` prints them): sft, rft, online-rft, dpo, ppo, grpo,
    grpo-process, dr-grpo, dapo, gspo, cispo, rloo, reinforce-pp."""
    source: Literal["live", "frozen", "rows"] = "live"
    """Where completions come from: the policy of the step, the start model, or the rows of the task."""
    baseline: Literal["group", "leave-one-out", "batch", "none", "indicator"] = "group"
    """What is taken off a reward: the mean of its group, of the others of its group, of the whole step, or nothing;
    "indicator" puts 1 for a right completion and 0 for any other in its place."""
    scale: Literal["group", "batch", "none"] = "group"
    """The standard deviation that an advantage is divided by: its group's, the whole step's, or none."""
    credit: Literal["completion", "token", "step", "pair", "value"] = "completion"
    """What a signal is of: a completion's reward; of each token, with the KL penalty in the reward where it arises; of
    steps, by rewards that judge them, with outcome rewards beside; of pairs of a right and a wrong completion of a
    question (DPO); or of each token, compared with what a value model expects (PPO, see [critic])."""
    right: float = 0.5
    """A completion is right if its reward is more than this: for "indicator" and pairs."""
    distinct: bool = False
    """Leave out completions of a question that repeat an earlier one's text."""
    most_per_prompt: Annotated[int, Field(ge=0)] = 0
    """At most so many right completions of a question, or pairs, are used, the first ones; 0 is all."""
    pair_beta: Annotated[float, Field(gt=0)] = 0.1
    """β of DPO: how strongly a pair's log-ratios to the reference are told apart."""
    ratio: Literal["token", "sequence"] = "token"
    """π_θ/π_old of each token, or of the whole completion (geometric mean of its tokens')."""
    surrogate: Annotated[str, Field(min_length=1)] = "clipped"
    """The policy term: "clipped" (Eq. 3), "clipped-weight" (detached clipped ratio times log π), "log-likelihood"
    (log π alone), or "package.module:function" in the signature of those in gruppo.algorithms.losses."""
    aggregation: Literal["sequence-mean", "sequence-sum", "group-token-mean", "token-mean", "constant"] = (
        "sequence-mean"
    )
    """How tokens are averaged: within each completion (Eq. 3), not at all, over the tokens of a group, over those of
    the step, or summed and divided by max_tokens; then over completions and groups."""
    clip_low: Fraction = 0.2
    """ε of the lower clip: the probability ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """ε of the upper clip: the probability ratio is clipped from above at 1 + clip_high."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.04
    """β, the weight of the KL term; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL: "k3" (the paper's Eq. 4) and "k2" (½ log²) stand in the loss; "k1" (log π_old/π_ref) has no
    expected gradient there and is taken off the reward."""
    importance_cap: Annotated[float, Field(ge=0)] = 0.0
    """Truncated importance sampling: tokens are weighted by π_old of the trainer over that of the engine, at most
    this; 0 is off."""
    inner_updates: Annotated[int, Field(ge=1)] = 1
    """μ, optimizer updates on each step's completions."""
    mask_truncated: bool = False
    """Treat a completion that was cut at max_tokens as if it had not been sampled."""
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    """How often a step draws other questions for its groups without signal, which are dropped; 0 keeps them."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_row(cls, data: Any) -> Any:
        name = data.get("name", "grpo") if isinstance(data, Mapping) else "grpo"
        row = METHODS.get(name) if isinstance(name, str) else None
        return {**row.settings, **data} if row is not None and isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _parameters_agree(self) -> Self:
        if self.name not in METHODS:
            raise ValueError(f'name = "{self.name}": unknown method{nearest(self.name, METHODS)}')
        self._source_agrees()
        if self.credit in {"token", "value"} and not {self.baseline, self.scale} <= {"batch", "none"}:
            raise ValueError(
                f'credit = "{self.credit}" gives each token its own signal, which baseline = "{self.baseline}" and '
                f'scale = "{self.scale}" do not know; write "batch" or "none" for both, or credit = "completion"'
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError(
                'scale = "group" with baseline = "none" would leave groups of equal rewards unscaled beside others; '
                'write scale = "batch" or "none"'
            )
        if self.surrogate == "log-likelihood" and self.inner_updates > 1:
            raise ValueError(
                f'inner_updates = {self.inner_updates}: surrogate = "log-likelihood" has no ratio that corrects for '
                'a policy that has moved; write inner_updates = 1, or surrogate = "clipped"'
            )
        if self.credit == "step" and (self.baseline, self.scale) != ("group", "group"):
            raise ValueError(
                f'credit = "step" normalises within the group; baseline = "{self.baseline}", scale = "{self.scale}": '
                'write "group" for both'
            )
        if self.credit == "step" and self.refill_rounds:
            raise ValueError(
                f"refill_rounds = {self.refill_rounds}: tells groups by the rewards of completions, and "
                'credit = "step" learns from those of steps; write refill_rounds = 0'
            )
        if self.ratio == "sequence" and self.credit in {"token", "step", "value"}:
            raise ValueError('ratio = "sequence" needs one advantage a completion; write credit = "completion"')
        if ":" not in self.surrogate and self.surrogate not in SURROGATES:
            raise ValueError(f'surrogate = "{self.surrogate}": unknown{nearest(self.surrogate, SURROGATES)}')
        return self

    def _source_agrees(self) -> None:
        """Fields that go together with where completions come from, and with pairs. Raises ValueError."""
        if self.source != "live" and self.importance_cap:
            raise ValueError(
                f'importance_cap = {self.importance_cap}: completions of source = "{self.source}" were not drawn from '
                "the policy; write importance_cap = 0"
            )
        if self.source == "rows" and self.refill_rounds:
            raise ValueError(
                f'refill_rounds = {self.refill_rounds}: source = "rows" samples nothing; write refill_rounds = 0'
            )
        if self.baseline == "indicator" and self.scale != "none":
            raise ValueError(f'scale = "{self.scale}" with baseline = "indicator": write scale = "none"')
        if self.credit != "pair":
            return
        wanted = {"baseline": "none", "scale": "none", "surrogate": "log-likelihood", "ratio": "token", "kl_coef": 0.0}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                fix = "0" if name == "kl_coef" else f'"{value}"'
                raise ValueError(f'{name} = {getattr(self, name)!r} with credit = "pair": write {name} = {fix}')
        if self.aggregation not in {"sequence-mean", "sequence-sum"}:
            raise ValueError(
                f'aggregation = "{self.aggregation}" with credit = "pair": write "sequence-mean" (log-ratios averaged '
                'over a completion, the paper\'s Eq. 12) or "sequence-sum" (summed, as is usual)'
            )

    @property
    def needs_reference(self) -> bool:
        """A frozen copy of the start model is needed: for a KL, for pairs, or to sample from."""
        return self.kl_coef > 0 or self.credit == "pair" or self.source == "frozen"

    @property
    def needs_scores(self) -> bool:
        """Log-probabilities of policy and reference are needed before advantages: for a KL in the reward, for pairs."""
        return self.kl_in_reward or self.credit == "pair"

    @property
    def needs_critic(self) -> bool:
        """Advantages come from a value model."""
        return self.credit == "value"

    @property
    def kl_in_loss(self) -> bool:
        """The KL is a term of the loss."""
        return self.kl_coef > 0 and self.kl_estimator != "k1"

    @property
    def kl_in_reward(self) -> bool:
        """The KL is taken off the reward."""
        return self.kl_coef > 0 and self.kl_estimator == "k1"


class Critic(Section):
    """The value model of PPO (`method.credit = "value"`); other methods have none."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Where its weights come from, as model.name; by default the policy's start weights. Its head begins at 0."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate after warm-up; warm-up, schedule and all else are those of [optimizer]."""
    clip: Annotated[float, Field(ge=0)] = 0.2
    """How far a value may move from what it was when the step was sampled before its loss stops to fall; 0 is no
    clipping."""
    gamma: Fraction = 1.0
    """γ, the discount of a reward for each token until it comes."""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation: 1 compares whole returns with values, 0 looks one token ahead."""


class Sampling(Section):
    """How a step's completions are drawn: always from the full distribution at the temperature."""

    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """P, questions a step."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """G, completions a question; a step samples prompts_per_step × group_size completions."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Tokens at which a completion is cut."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by this; π_θ, π_old and π_ref are all taken at it."""


class Optimizer(Section):
    """AdamW with float32 master weights."""

    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate after warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or linearly or along a half cosine towards 0 behind the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0 (the first step already moves)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean of squares."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only (norms and biases have none)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A gradient whose norm is larger is scaled down to it."""


class Decoding(Section):
    """How answers are drawn where nothing is trained on them. Each option acts on what the one before left over."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Logits are divided by this; 0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many likeliest tokens only; 0 is off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: Fraction = 0.0
    """Draw only from tokens with at least this share of the likeliest one's probability."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens before which an answer cannot end."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """An answer ends before the first of these texts, wherever the borders of tokens are."""


class Evaluation(Section):
    """Accuracy on held-out questions; leave the table out for no evaluation."""

    task: Task | None = None
    """Task of the questions, a table as [task] or only its name; by default the held-out part of the training task."""
    questions: Annotated[int, Field(ge=1)] = 256
    """How many questions at the most, taken from the start of the held-out part."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step only."""
    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Answers a question; the accuracy is over all of them."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens at which an answer is cut; by default that of sampling."""
    grader: str | None = None
    """Judge of an answer, apart from the reward: "number", "choice", "math", "exact_match", "reasoning_gym" or
    "package.module:function"; by default that of the task, "number" for a file or function."""
    decoding: Decoding = Decoding()
    """How answers are drawn; by default greedily."""

    @field_validator("task", mode="before", json_schema_input_type=Task | str)
    @classmethod
    def _name_alone(cls, task: Any) -> Any:
        return {"name": task} if isinstance(task, str) else task


class Benchmark(Evaluation):
    """Another task that is evaluated while training, each in a table of its own: the fields of [evaluation], with a
    task, and a name. Its metrics are eval/NAME/accuracy and so on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = None
    """What it is called; by default as its task, or its file without folder and ending."""

    @model_validator(mode="after")
    def _task_is_named(self) -> Self:
        if self.task is None:
            raise ValueError('task: missing; write e.g. task = "gsm8k"')
        return self

    @property
    def title(self) -> str:
        """What it is called."""
        assert self.task is not None
        if self.name is not None:
            return self.name
        file = re.fullmatch(r"(?:.*[/\\])?([^/\\]+)\.(?:jsonl|json|csv|tsv|parquet)", self.task.name, re.IGNORECASE)
        stem = file[1] if file else self.task.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[-100:] or "task"


class Recipe(Section):
    """All that decides what a run computes."""

    run: Run = Run()
    model: Model
    task: Task = Task()
    """The task, where there is one."""
    mixture: list[Task] = []
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
    benchmarks: list[Benchmark] = []
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
        if self.method.source == "rows" and self.reward.functions:
            raise ValueError(
                f'reward.functions = {self.reward.functions}: method.source = "rows" scores nothing; remove it'
            )
        if self.method.credit == "pair" and self.method.source != "rows" and self.sampling.group_size < 2:
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
        if self.method.source == "rows":
            raise ValueError('[environment]: method.source = "rows" samples nothing; leave the table out')
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
        if rounds > 1 and method.source != "live":
            raise ValueError(
                f'run.iterations = {rounds}: method.source = "{method.source}" does not sample from the policy; write 1'
            )
        if rounds > 1 and self.model.lora is not None:
            raise ValueError(
                f"run.iterations = {rounds}: the reference of adapters is the model without them and cannot become "
                "the policy; write iterations = 1, or leave [model.lora] out"
            )
        if method.source == "rows":
            for name, table in (("reward_model", model), ("audit", self.audit)):
                if table is not None:
                    raise ValueError(f'[{name}]: method.source = "rows" scores nothing; leave the table out')
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


# Fields that users of other trainers will look for, with the reason why they are not here.
_REFUSED = {
    ("sampling", name): "training samples from the full distribution, so that π_old is what was drawn from; "
    f"{name} exists in `gruppo sample` and evaluation only. Remove it, or use temperature"
    for name in ("top_p", "top_k", "min_p")
} | {
    ("model", "dropout"): "there is none on adapters, so that what samples and what is trained is one distribution; "
    "remove it",
    ("method", "micro_batch_size"): "the micro-batch is derived from memory and never changes a result; remove it",
}


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, a mapping or a Recipe, change it by "section.field=value", and validate it.

    A file or mapping that says `extends = "other.toml"` (relative to the file; for a mapping, to the working directory)
    is laid over that recipe: tables field by field, everything else whole. A [task] replaces a [[mixture]] below it and
    a [[mixture]] a [task]; run.name is never taken over. A value of an override is read as TOML, and as plain text
    where it is none. Raises RecipeError with a line for each mistake: file, field, value, and what to write instead.
    """
    files = _read(source)
    where, data = files[0][0], _laid_over([data for _, data in files])
    for override in overrides:
        data = _override(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{_writer(files, details['loc'])}: {_explain(details)}" for details in error.errors()]
        raise RecipeError(*dict.fromkeys(lines)) from None
    try:
        recipe.to_toml().encode()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: options hold a value that TOML cannot write ({error}); use plain values") from None
    return recipe


_MOST_BYTES = 16 * 2**20

# The files that a recipe is made of, each by its name, from the one that was asked for to the last that is extended.
_Files = list[tuple[str, dict[str, Any]]]


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> _Files:
    if isinstance(source, Recipe):
        return [("recipe", source.as_mapping())]
    if isinstance(source, Mapping):
        if odd := [key for key in source if not isinstance(key, str)]:
            raise RecipeError(f"recipe: {odd[0]!r} is no name of a table; write text")
        files, folder, seen = [("recipe", copy.deepcopy(dict(source)))], Path(), []
    elif isinstance(source, str | Path):
        path = Path(source)
        files, folder, seen = [(str(path), _read_file(path))], path.parent, [path.resolve()]
        if isinstance(run := files[0][1].setdefault("run", {}), dict):
            run.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run")
    else:
        raise RecipeError(f"recipe = {source!r}: neither a path, a mapping nor a Recipe; give one of them")
    while "extends" in files[-1][1]:
        where, data = files[-1]
        wanted = data.pop("extends")
        if not isinstance(wanted, str) or not wanted:
            raise RecipeError(f'{where}: extends = {wanted!r}: must be the path of a recipe; write e.g. "other.toml"')
        path = folder / user_path(wanted)
        if not is_file(path):
            raise RecipeError(f'{where}: extends = "{wanted}": there is no file {path}; give a path from {where}')
        if path.resolve() in seen:
            raise RecipeError(f'{where}: extends = "{wanted}": leads back to {path}; extend a recipe that stands alone')
        base = _read_file(path)
        if isinstance(run := base.get("run"), dict):
            run.pop("name", None)
        files.append((str(path), base))
        folder, seen = path.parent, [*seen, path.resolve()]
    return files


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise RecipeError(f"{path}: has more than {_MOST_BYTES / 2**20:.0f} MiB; give a recipe")
        return tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except RecipeError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"{path}: there is no such recipe file; give the path of a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}; mend that line") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error}); give a readable UTF-8 .toml file") from None


def _laid_over(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers as one, the first on top. Other reward functions come without the options of those before; a task
    takes the place of a mixture, and the other way round."""
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        if "mixture" in layer or "task" in layer:
            merged.pop("task" if "mixture" in layer else "mixture", None)
        reward, before = layer.get("reward"), merged.get("reward")
        if isinstance(reward, dict) and isinstance(before, dict) and "functions" in reward:
            merged["reward"] = _without_functions(before, reward["functions"])
        merged = _merged(merged, layer)
    return merged


def _without_functions(reward: Mapping[str, Any], functions: Any) -> dict[str, Any]:
    """A [reward] table whose functions are about to become others: without the options of those that go."""
    options = reward.get("options")
    if not isinstance(options, dict) or not isinstance(functions, list):
        return dict(reward)
    return {**reward, "options": {name: values for name, values in options.items() if name in functions}}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        held = merged.get(key)
        merged[key] = _merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def _writer(files: _Files, location: Sequence[str | int]) -> str:
    """The name of the file that wrote the field; the one that was asked for where none did."""

    def holds(data: Any) -> bool:
        for part in location:
            try:
                data = data[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    return next((where for where, data in files if location and holds(data)), files[0][0])


def toml_value(text: str) -> Any:
    """A value as it would stand behind `=` in TOML; the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """The recipe with one field changed. The key is one of TOML, so that quotes hold a name with dots together."""
    form = f'--set {override}: not of the form section.field=value; write e.g. --set "run.steps=50"'
    key, equals, text = _split(override)
    try:
        layer: Any = tomllib.loads(f"{key} = 0")
    except ValueError:
        raise RecipeError(form) from None
    path: list[str] = []
    while isinstance(layer, dict) and len(layer) == 1:
        ((name, layer),) = layer.items()
        path.append(name)
    if not equals or len(path) < 2 or layer != 0:
        raise RecipeError(form)
    if path[0] in {"mixture", "benchmarks"}:
        raise RecipeError(f"--set {override}: tables of a list have no names; write them in the recipe")
    table: Any = data
    for part in path[:-1]:
        table = table.get(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {part} is not a table of the recipe; write section.field=value")
    value: Any = toml_value(text)
    for part in reversed(path):
        value = {part: value}
    return _laid_over([value, data])


def _split(override: str) -> tuple[str, str, str]:
    """Key, "=" and value; an "=" within quotes belongs to the key."""
    quoted = False
    for place, letter in enumerate(override):
        quoted ^= letter == '"'
        if letter == "=" and not quoted:
            return override[:place], "=", override[place + 1 :]
    return override, "", ""


def _explain(details: ErrorDetails) -> str:
    """One mistake as `field = value: what is wrong; what to write`."""
    location = [str(part) for part in details["loc"]] or ["recipe"]
    field, kind = re.sub(r"^(mixture|benchmarks)\.(\d+)", r"\1[\2]", ".".join(location)), details["type"]
    if kind == "extra_forbidden":
        if reason := _REFUSED.get((location[0], location[-1])):
            return f"{field} = {details['input']!r}: {reason}"
        section = _section(location[:-1])
        what = "field" if len(location) > 1 else "table"
        known = section.model_fields if section else []
        return f"{field} = {_short(details['input'])}: unknown {what}{nearest(location[-1], known)}"
    if kind == "missing":
        example = {"audit.function": "math", "environment.name": "python"}.get(field, "smollm2-135m-instruct")
        return f'{field}: missing; write e.g. {location[-1]} = "{example}" in [{".".join(location[:-1])}]'
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return f"{field}.{message}" if details["loc"] else message
    if tables := next((name for name in ("mixture", "benchmarks") if location[0] == name and len(location) < 3), ""):
        return f"{field} = {_short(details['input'])}: must be tables; write [[{tables}]] and its fields below"
    if kind in {"model_type", "dict_type", "model_attributes_type"} and _section(location):
        return f"{field} = {_short(details['input'])}: must be a table; write [{field}] and its fields below"
    text = details["msg"].removeprefix("Input ").replace("should", "must")
    return f"{field} = {_short(details['input'])}: {text}{_fix(location)}"


def _section(location: Sequence[str]) -> type[Section] | None:
    """The table at a place of the recipe."""
    section: type[Section] = Recipe
    for name in location:
        if name.isdecimal():
            continue  # a task of the mixture
        if name not in section.model_fields:
            return None
        annotation = section.model_fields[name].annotation
        kinds = [annotation, *get_args(annotation)]
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if found is None:
            return None
        section = found
    return section


def _fix(location: Sequence[str]) -> str:
    places = [place for place in range(len(location), 1, -1) if _section(location[: place - 1])]
    if not places:
        return ""
    section = _section(location[: places[0] - 1])
    name = location[places[0] - 1]
    if section is None or name not in section.model_fields:
        return "; write text as the name of a field"
    field = section.model_fields[name]
    if field.is_required() or not field.default:
        return f"; {field.description}"
    return f"; write e.g. {tomli_w.dumps({name: field.default}).strip()}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

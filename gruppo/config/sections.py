"""The tables of a recipe. Each field has its meaning, unit and default in its docstring."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gruppo.config.units import as_bytes, share_or_size
from gruppo.errors import nearest

Fraction = Annotated[float, Field(ge=0, le=1)]


Finite = Field(allow_inf_nan=False)


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
    labels come from reward.functions: a completion is right where the first of them gives more than method.success_threshold."""

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
    replay_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a round's training set that is drawn from the samples of earlier rounds."""
    replay_capacity: Annotated[int, Field(ge=0)] = 10_000
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
    """Judge of an answer, apart from the reward: "numeric_answer", "choice", "math_answer", "exact_match", "reasoning_gym" or
    "package.module:function"; by default that of the task, "numeric_answer" for a file or function."""
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

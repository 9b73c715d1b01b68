"""The tables of a recipe, except [method] and [critic]. Each field's docstring gives its meaning, unit and default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gruppo.config.chat_options import check_json, check_kwargs, check_tools
from gruppo.config.labels import label_mistake, options_name, split_label
from gruppo.config.units import Size, share_or_size
from gruppo.errors import nearest

Fraction = Annotated[float, Field(ge=0, le=1)]


Finite = Field(allow_inf_nan=False)


# Built-in policy terms by name; `method.surrogate` also accepts an import path.
SURROGATES = {
    "clipped": "gruppo.algorithms.losses:clipped",
    "clipped-weight": "gruppo.algorithms.losses:clipped_weight",
    "log-likelihood": "gruppo.algorithms.losses:log_likelihood",
}


# Trackers that a run can log to: the names that accelerate gives them.
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "swanlab"]


class Section(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    REPLACES: ClassVar[Mapping[str, str]] = {}
    """Optional field -> the field whose place it takes if it is set."""

    @property
    def replaced(self) -> set[str]:
        """The fields that have no effect, because the field that takes their place is set."""
        return {old for new, old in self.REPLACES.items() if getattr(self, new) is not None}

    @model_validator(mode="after")
    def _only_one_is_set(self) -> Self:
        for new, old in self.REPLACES.items():
            if getattr(self, new) is not None and old in self.model_fields_set:
                raise ValueError(
                    f"{new} = {getattr(self, new)}: takes the place of {old} = {getattr(self, old)}; write only one of "
                    "them"
                )
        return self


class Run(Section):
    """Name, length, seed, checkpoints, memory limit and trackers of the run."""

    REPLACES: ClassVar[Mapping[str, str]] = {"epochs": "steps"}

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Name of the run. The run folder is runs/<name> unless --out is given. Default: the recipe's file name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed; determines the order of the prompts and every sampled token."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Number of steps. Each step samples completions for a batch of prompts, scores them and updates the policy
    method.inner_updates × method.minibatches times."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length in passes over the training prompts, in place of steps: epochs × prompts / sampling.prompts_per_step,
    rounded up to whole steps and to a multiple of iterations. A pass over a [[mixture]] has as many prompts as all of
    its tasks together, sampled by weight. Prompts that dynamic sampling adds to a step do not count."""
    iterations: Annotated[int, Field(ge=1)] = 1
    """I, the outer iterations of Algorithm 1: the steps are split into this many equal parts. At the start of every
    iteration a [reward_model] is trained on new samples; from the second iteration on, the reference is also reset to
    the current policy. TRL's num_iterations is not this but method.inner_updates."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 10
    """Steps between checkpoints. The latest two and the best are kept; the last step is always saved. In gruppo
    reward-model: updates, or more where saving would take more than a tenth of the time."""
    memory: float | str = 0.6
    """Peak memory of the process: a fraction of the memory that is free when the run starts, or a size such as "6 GB"
    or "5.5 GiB". The micro-batch and the slots (concurrent completions) are derived from it once, at the start; they
    affect results by rounding only."""
    noise_every: Annotated[int, Field(ge=0)] = 20
    """Steps between measurements of the noise of the gradient: how far two halves of a step's groups agree
    (gradient/agreement, docs/metrics.md). Each takes half an update; nothing else changes. 0: none."""
    trackers: list[Tracker] = []
    """Trackers that get the metrics, the recipe and a sample of the completions, such as ["tensorboard", "wandb"]. Each
    runs in a process of its own: one that fails or hangs is an event, and the run goes on. Default: none. See
    docs/trackers.md."""

    _checked_memory = field_validator("memory", mode="before")(share_or_size)

    @model_validator(mode="before")
    @classmethod
    def _trackers_are_known(cls, data: Any) -> Any:
        names = data.get("trackers", []) if isinstance(data, Mapping) else []
        known = get_args(Tracker)
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and name not in known:
                raise ValueError(f'trackers = {names}: "{name}" is no tracker{nearest(name, known)}')
            if names.count(name) > 1:
                raise ValueError(f'trackers = {names}: "{name}" is listed twice; write it once')
        return data

    @field_validator("name")
    @classmethod
    def _is_portable(cls, name: str) -> str:
        if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", name):
            raise PydanticCustomError("name", "must be a valid folder name on every operating system")
        return name


class Lora(Section):
    """Low-rank adapters (LoRA, via peft) in place of full fine-tuning: W + alpha/rank · B·A, where only A and B are
    trained. Adapters have no dropout, so that sampling and training use the same distribution."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapters: rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The output of each adapter is scaled by alpha / rank."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get an adapter: "all-linear" for every linear layer except the output head (experts that are not
    linear layers get none), or a list of layer name suffixes, such as ["q_proj", "v_proj"]."""
    base: Literal["full", "4bit"] = "full"
    """How W is stored: in the compute dtype, or in 4 bits (QLoRA; needs gruppo[lean]), which changes the model."""

    @model_validator(mode="before")
    @classmethod
    def _targets_are_names(cls, data: Any) -> Any:
        targets = data.get("targets", "all-linear") if isinstance(data, Mapping) else "all-linear"
        listed = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
        if targets != "all-linear" and not listed:
            raise ValueError(
                f'targets = {targets!r}: must be "all-linear" or a list of layer names; write e.g. ["q_proj", "v_proj"]'
            )
        return data


class Model(Section):
    """Initial weights of the policy, device and compute dtype."""

    name: Annotated[str, Field(min_length=1)]
    """Hugging Face hub name, with a branch, tag or commit if wanted ("owner/name@revision"), local folder, GGUF file or
    alias ("smollm2-135m-instruct")."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on; "auto" picks the first one available of cuda, mps and cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype of matrix multiplications (matmuls); "auto" is bfloat16 if the device supports it natively, else
    float32. Trained weights and gradients are float32, and so are AdamW's moments unless optimizer.state says otherwise
    (all float64 with "float64", meant for numerical checks)."""
    attention: Literal["auto", "cpu", "sdpa", "flex", "varlen"] = "auto"
    """Attention over packed groups, and the modules around it. "cpu": gruppo's decoder and C kernels, for a CPU. The
    others run transformers' modules: "sdpa" is torch's attention, on any device; "flex" (FlexAttention) and "varlen"
    (flash attention, in bfloat16) need cuda. "auto": "cpu" on a CPU; on cuda the first of varlen, flex and sdpa that
    can compute the model's layers; else "sdpa"."""
    compile: bool = False
    """Compile the layers of transformers' modules with torch.compile, for training only. The first steps take a minute
    or more longer; a step is faster afterwards, where small operations dominate. Not with attention = "cpu"."""
    trust_remote_code: bool = False
    """Run the Python files that come with model.name. They run with your permissions: read them first."""
    lora: Lora | None = None
    """Train adapters only. Leave the table out to train all weights."""


class Task(Section):
    """Source of the prompts, and how a row becomes a prompt."""

    name: Annotated[str, Field(min_length=1)] = "arithmetic"
    """"arithmetic"; a benchmark by name ("gsm8k", "math", …); "reasoning-gym/NAME"; a file (.jsonl, .json, .csv, .tsv,
    .parquet, .xml); a folder saved by the datasets library; a dataset on the Hugging Face hub ("owner/name"); or
    "package.module:function"."""
    options: dict[str, Any] = {}
    """Options of the task, passed as keyword arguments. Arithmetic: maximum, held_out, negative. reasoning-gym: size,
    seed and the options of the dataset. Benchmarks: data, prompt, shots, format. Hub datasets: name, revision."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Split of the dataset ("train", "test", …). Default: "train" for training, "test" for evaluation."""
    columns: dict[str, str] = {}
    """Column names: gruppo's name = the dataset's name, e.g. `{prompt = "question", answer = "solution"}`. Other
    columns keep their names."""
    template: str | None = None
    """Prompt template with column names in braces, e.g. "{question} Think first.". Double braces stand for literal
    braces."""
    system: str | None = None
    """Convert text prompts into conversations with this system message; "" converts them without a system message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template, e.g. `{enable_thinking = false}`. A row's column `chat_template_kwargs`
    overrides them one by one. Default: none; for evaluation, those of the training tasks."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of functions that the chat template describes in the prompt. A row's column `tools` replaces them.
    Default: none; for evaluation.task, those of the training tasks."""
    completion: str | None = None
    """Completion template with column names in braces, e.g. "The answer is {answer}."; for methods with
    source = "dataset"."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the rows held out from training, selected by a hash of each row's question. Evaluation uses these
    rows."""
    held_out_by: Literal["question", "prompt"] = "question"
    """What is hashed: "question" is the row's own prompt, or the columns in the template, so that template and system
    message do not change which rows are held out; "prompt" is the finished prompt, as in versions without this
    field."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum prompt length in tokens. Default: the model's context length minus the completion length."""
    overlong: Literal["refuse", "filter"] = "refuse"
    """If prompts are longer than that: "refuse" rejects the recipe, "filter" leaves them out and reports how many.
    Prompts are never truncated."""
    memory: Size = "8 GB"
    """Maximum memory of the task's rows, unpacked, such as "500 MB" or "32 GB". A larger source is refused."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Sampling weight of this task in a mixture, relative to the other tasks."""

    @model_validator(mode="before")
    @classmethod
    def _template_options_are_valid(cls, data: Any) -> Any:
        for name, check in (("chat_template_kwargs", check_kwargs), ("tools", check_tools)):
            if isinstance(data, Mapping) and (value := data.get(name)) is not None:
                check(value)
                check_json(value, name)
        return data


class Reward(Section):
    """How completions are scored."""

    functions: list[str] = []
    """Reward functions: built-in names (gruppo.rewards.REWARDS), "package.module:function" or "file.py:function". The
    prefix "verl:" or "verifiers:" before the path selects the signature of that library. "label = function" gives a
    function a name of its own, in metrics and in `options`, so that one function can be used several times."""
    weights: list[float] = []
    """One weight per function, in the same order. Default: 1 for every function."""
    options: dict[str, dict[str, Any]] = {}
    """Keyword arguments per function, keyed by its label, or else by its name in `functions`:
    `options.regex.pattern = "\\\\d+"`."""
    timeout: Annotated[float, Field(gt=0)] = 10.0
    """Time limit in seconds of one call (one function, one group). After that the process is killed, and the
    completions of the group are excluded."""
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Worker processes that run reward functions in parallel."""
    failure_limit: Fraction = 0.2
    """Fraction of a step's completions that may be excluded because a reward failed. Above it, the run is saved and
    stops with the reason. 1 never stops the run."""
    memory: float | str = 0.5
    """Memory limit of all worker processes together, divided equally among them: a fraction of the machine's memory, or
    a size such as "4 GB". An allocation beyond the limit fails in the reward function, and the completions of that call
    are excluded."""
    environment: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = []
    """Names of environment variables to pass on to reward functions, such as ["OPENAI_API_KEY"]. Apart from these they
    get only variables that locate programs, libraries and caches, and no secrets."""

    _checked_memory = field_validator("memory", mode="before")(share_or_size)

    @model_validator(mode="after")
    def _lists_fit(self) -> Self:
        if self.weights and self.functions and len(self.weights) != len(self.functions):
            raise ValueError(
                f"weights = {self.weights}: {len(self.weights)} numbers for {len(self.functions)} functions; "
                "write one weight per function, or leave weights out"
            )
        if mistakes := [mistake for mistake in map(label_mistake, self.functions) if mistake]:
            raise ValueError(f"functions = {self.functions}: {mistakes[0]}")
        labels = [label for label, _ in map(split_label, self.functions) if label]
        if duplicates := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(
                f'functions = {self.functions}: two have the label "{duplicates[0]}"; give one of them another label'
            )
        names = [options_name(function) for function in self.functions]
        for name, options in self.options.items() if self.functions else ():
            if name not in names:
                raise ValueError(
                    f"options.{name} = {options}: reward.functions has no function of this name{nearest(name, names)}"
                )
            if names.count(name) > 1:
                raise ValueError(
                    f'options.{name} = {options}: reward.functions names "{name}" {names.count(name)} times; give each '
                    f'of them a label, as in functions = ["first = {name}", "second = {name}"], and options by label'
                )
        return self


class RewardModel(Section):
    """A trained model that scores completions in addition to, or in place of, reward functions (whose weights may be
    0). Its labels come from reward.functions: a completion is correct if the reward of the first function is greater
    than method.success_threshold."""

    kind: Literal["outcome", "process"] = "outcome"
    """"outcome": one probability per completion. "process": one per step of a completion; requires
    method.credit = "step"."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Initial weights, as in model.name, or the folder of a reward model. Default: the policy's initial weights. A new
    head starts at 0."""
    weight: float = 1.0
    """Weight of its score in the total reward, next to reward.weights."""
    prompts: Annotated[int, Field(ge=0)] = 64
    """Prompts of one round of reward model training: for each, sampling.group_size completions are sampled and labeled.
    Rounds take place before the first step and at the start of each later iteration. 0 trains nothing."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of these prompts held out from its training; the reward model is measured on them before and after each
    round."""
    learning_rate: Annotated[float, Field(ge=0)] = 2e-5
    """Learning rate of its AdamW, constant. Everything else is as in [optimizer]."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training set per round."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Completions per update."""
    replay_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of a round's training set that is taken from the samples of earlier rounds."""
    replay_capacity: Annotated[int, Field(ge=0)] = 10_000
    """Number of most recent earlier samples that can be replayed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed; determines the held-out prompts, the replayed samples and the training order."""
    split: Annotated[str, Field(min_length=1)] = "lines"
    """How a completion is split into steps: "lines", or "package.module:function", which maps a text to the end of each
    step in characters."""
    continuations: Annotated[int, Field(ge=1)] = 4
    """N: completions sampled from the end of each step to label it (Math-Shepherd)."""
    labels: Literal["hard", "soft"] = "hard"
    """Label of a step: "hard" is 1 if any continuation is correct, else 0; "soft" is the fraction that is correct."""


class Environment(Section):
    """Environment for multi-turn completions: it runs the Python blocks that the model writes, or a user-defined class
    answers the model turn by turn. The model reads these answers, but they are excluded from the loss. Leave the table
    out for single-turn completions. See docs/environments.md."""

    name: Annotated[str, Field(min_length=1)]
    """"python" (Python blocks are run in a sandbox and their output is appended), "package.module:Class" or
    "file.py:Class": a class with gruppo's interface (reset, step) or TRL's (reset, tools as methods)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the class. Every completion gets a new instance."""
    turns: Annotated[int, Field(ge=1)] = 4
    """Maximum answers per completion. The completion ends with the text that the model writes after the last answer."""
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time limit of one answer in seconds: one Python block (wall-clock and processor time) or one call of the
    class."""
    memory: Size = "512 MiB"
    """Memory limit of one sandbox, or of one process that runs instances of the class: "512 MiB", "1 GB"."""
    output: Annotated[int, Field(ge=1)] = 2000
    """Maximum length in characters of an answer shown to the model. Longer answers are truncated with a note."""
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Answers computed in parallel: number of sandboxes, or of processes that run instances of the class."""
    weight: float = 1.0
    """Weight of get_reward() in the total reward, next to reward.weights, if the class defines it."""
    run_model_code_WITHOUT_A_SANDBOX: bool = False  # noqa: N815  ugly on purpose: it is dangerous
    """Run the model's code as you, with all your permissions. Use it only on a machine where nothing can be lost."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.name != "python" and ":" not in self.name:
            raise ValueError(
                f'name = "{self.name}": unknown environment; write "python", "package.module:Class" or "file.py:Class"'
            )
        if self.name == "python" and self.options:
            raise ValueError(f'options = {self.options}: name = "python" takes no options; remove them')
        if self.name != "python" and self.run_model_code_WITHOUT_A_SANDBOX:
            raise ValueError(
                f'run_model_code_WITHOUT_A_SANDBOX = true: name = "{self.name}" runs no code of the model; remove it'
            )
        return self


class Audit(Section):
    """Reward audit: a second reward function scores a sample of the completions and is never trained on. An event warns
    if the reward rises and the audit does not (DeepSeekMath §5.2.3). Leave the table out for no audit."""

    function: Annotated[str, Field(min_length=1)]
    """One function, as in reward.functions; not one that the run is trained on."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of each step's groups that are audited, at least one group."""
    window: Annotated[int, Field(ge=4)] = 10
    """Steps over which the trends of reward and audit are compared."""


class Sampling(Section):
    """How training completions are sampled: always from the full distribution at the given temperature."""

    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """P: prompts per step."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """G: completions per prompt. A step samples prompts_per_step × group_size completions."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Maximum completion length in tokens. Longer completions are truncated."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by this value; π_θ, π_old and π_ref are all computed at this temperature."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Stop strings: the completion ends with the first occurrence of any of them, regardless of token boundaries, as
    with an EOS token. The loss covers every sampled token, also the part of the last one that follows the stop string.
    With an environment, they end the whole completion. Evaluation uses them too, unless it sets decoding.stop."""


class Optimizer(Section):
    """AdamW with float32 master weights."""

    REPLACES: ClassVar[Mapping[str, str]] = {"warmup_ratio": "warmup_steps"}

    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate after warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a linear or half-cosine decay that would reach 0 one step after the
    last."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0. The learning rate of the first step is already above 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a fraction of run.steps, rounded up to whole steps, in place of warmup_steps."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment (mean of gradients)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of AdamW's second moment (mean of squared gradients)."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; applied to matrices only, not to norms and biases."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping: a gradient with a larger norm is scaled down to this norm."""
    state: Literal["float32", "8bit", "cpu"] = "float32"
    """AdamW's moments: float32; rounded to 8 bits (2 bytes per trained weight, not 8; needs gruppo[lean]); or float32
    in CPU memory while the model is on an accelerator (slower updates, the same numbers)."""


class Decoding(Section):
    """How answers are sampled in evaluation and `gruppo sample`, where nothing is trained on them. The options apply in
    the order listed, each to the tokens that the previous one kept."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Logits are divided by this value; 0 takes the most likely token (greedy)."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens only; 0 turns it off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this value; 1 turns it off."""
    min_p: Fraction = 0.0
    """Sample only from tokens with at least this fraction of the most likely token's probability; 0 turns it off."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Minimum answer length in tokens; the answer cannot end earlier."""
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    """Stop strings: the answer ends before the first occurrence of any of them, regardless of token boundaries.
    Default: sampling.stop; the answer then ends as in training, with the stop string included."""


class Evaluation(Section):
    """Accuracy on held-out questions. Leave the table out for no evaluation."""

    task: Task | None = None
    """Task that the questions come from: a table like [task], or only its name. Default: the held-out part of the
    training task."""
    inherit: bool = True
    """Give this task the `columns`, `template` and `system` of the training task, unless it sets them. A task with
    prompts of its own (arithmetic, reasoning-gym, a benchmark) inherits only `system`, in [[benchmarks]] nothing,
    unless training uses the same task. In a mixture, the table of the same name counts, else what all tables agree
    on."""
    questions: Annotated[int, Field(ge=1)] = 256
    """Maximum number of questions, taken from the start of the held-out part."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations. 0 evaluates only before the first and after the last step."""
    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Answers per question; the accuracy is the average over all of them."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum answer length in tokens. Longer answers are truncated. Default: sampling.max_tokens."""
    grader: str | None = None
    """Grader of the answers, independent of the reward: "numeric_answer", "choice", "math_answer", "exact_match",
    "reasoning_gym" or "package.module:function". Default: the grader of the task; "numeric_answer" for a file or
    function."""
    decoding: Decoding = Decoding()
    """How answers are sampled. Default: greedily."""

    @field_validator("task", mode="before", json_schema_input_type=Task | str)
    @classmethod
    def _name_alone(cls, task: Any) -> Any:
        return {"name": task} if isinstance(task, str) else task


class Benchmark(Evaluation):
    """An additional task that is evaluated during training, one table per task: the fields of [evaluation], where
    `task` is required, and a name. Its metrics are eval/NAME/accuracy and so on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = None
    """Name in metrics and results. Default: the name of the task, or of its file without folder and extension."""

    @model_validator(mode="after")
    def _task_is_named(self) -> Self:
        if self.task is None:
            raise ValueError('task: missing; write e.g. task = "gsm8k"')
        return self

    @property
    def title(self) -> str:
        """Name in metrics and results."""
        assert self.task is not None
        if self.name is not None:
            return self.name
        file = re.fullmatch(r"(?:.*[/\\])?([^/\\]+)\.(?:jsonl|json|csv|tsv|parquet)", self.task.name, re.IGNORECASE)
        stem = file[1] if file else self.task.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[-100:] or "task"

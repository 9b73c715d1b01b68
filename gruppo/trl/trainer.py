"""What all trainers with TRL's interface have in common."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.models.compatibility import context_length
from gruppo.models.loading import find_model
from gruppo.rewards import RewardFunction
from gruppo.runs.console import choose_progress
from gruppo.runs.results import Result
from gruppo.training.api import run_recipe
from gruppo.training.export import export
from gruppo.training.setup import Local, RunComponents
from gruppo.trl.arguments import check
from gruppo.trl.batches import Batches, batches_of
from gruppo.trl.callbacks import Moments, check_callback
from gruppo.trl.configs import TrainingArguments
from gruppo.trl.data import (
    is_conversation,
    load_in_memory,
    lora_of,
    plain_model,
    rows_of,
    sized,
    text_tokenizer,
    tokenizer_for,
)
from gruppo.trl.familiar import Familiar
from gruppo.trl.folders import resumes, run_folder
from gruppo.trl.quantization import FORM, asks_for_four_bits, check_model
from gruppo.trl.recipes import Length, init_kwargs, length_of, recipe_of
from gruppo.trl.sampling import Sampler
from gruppo.trl.upload import upload
from gruppo.types import Row
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.progress import NullProgress, Progress


class TrainOutput(NamedTuple):
    """What `train` returns. `training_loss`: the mean over all steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """A training that is ready to start."""

    recipe: Recipe
    batches: Batches
    length: Length
    rows: Sequence[Row]


class Trainer(Familiar):
    """A trainer with TRL's interface that runs a recipe of gruppo.

    `args`: what becomes of each is in `gruppo.trl.arguments`. `state`: transformers' TrainerState, with `log_history`
    under TRL's names. `result`: of the last training, None before it. Its folder is output_dir/gruppo; a further
    training has the folder gruppo-2, and so on.
    """

    config: ClassVar[type[TrainingArguments]]
    method: ClassVar[str]

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`processing_class`: the tokenizer; `tokenizer`: its name in earlier versions.

        Raises UsageError for an argument that gruppo has nothing for, with what to write instead.
        """
        if optimizers != (None, None):
            raise UsageError(f"optimizers = {optimizers!r}: the optimizer is AdamW; write args")
        check_model(model)
        self._given, peft_config = plain_model(model, peft_config)
        self.args = self._arguments(args, model)
        self.processing_class = text_tokenizer(processing_class or tokenizer)
        self._name, self._in_memory = self._start_model()
        self.peft_config = peft_config
        self._lora = None if peft_config is None else lora_of(peft_config, self._config.model_type)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.ignored = check(self.args)
        in_kwargs = init_kwargs(self.args).get("quantization_config")
        for name, config in (("quantization_config", quantization_config), ("model_init_kwargs", in_kwargs)):
            if asks_for_four_bits(config, name, self._lora is not None) and self._lora is not None:
                self._lora["base"] = "4bit"
        self.batches = batches_of(self.args)
        self.state = TrainerState(log_history=[])
        self.result: Result | None = None
        self._sampler: Sampler | None = None
        self._progress: Progress = choose_progress(not self.args.disable_tqdm)
        self.moments = Moments(self, [check_callback(callback) for callback in callbacks or ()])
        if self.args.eval_strategy != "no" and eval_dataset is None:
            raise UsageError(
                f'eval_strategy = "{self.args.eval_strategy}": give the trainer an eval_dataset, or write "no"'
            )
        self.accelerator = SimpleNamespace(
            is_main_process=True, is_local_main_process=True, process_index=0, num_processes=1, device=self.args.device,
            print=print, wait_for_everyone=lambda: None, unwrap_model=lambda wrapped, **_: wrapped,
        )  # fmt: skip
        self.moments.call("on_init_end")

    # Building the run.

    def _arguments(self, args: TrainingArguments | None, model: Any) -> TrainingArguments:
        """The arguments, with an output_dir as in TRL. Raises UsageError for the config of another trainer."""
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "model")
        folder = f"{Path(name).name}-{self.method}"
        if args is None:
            return self.config(folder)
        if not isinstance(args, self.config):
            raise UsageError(
                f"args: is a {type(args).__module__}.{type(args).__name__}; write "
                f"from gruppo.trl import {self.config.__name__}"
            )
        args = copy.copy(args)
        args.output_dir = args.output_dir or "trainer_output"
        return args

    def _start_model(self) -> tuple[str, PreTrainedModel | None]:
        """The name of the start model, and the model if it is in memory. Completes `processing_class`."""
        given, tokenizer = self._given, self.processing_class
        trust = bool(self.args.trust_remote_code or init_kwargs(self.args).get("trust_remote_code"))
        if isinstance(given, str):
            if tokenizer_for(given, tokenizer, trust):
                given = load_in_memory(given, trust)
                self._config = given.config
                return str(self._given), given
            source = find_model(given, NullProgress(), None, trust)
            self._config = source.config
            self.processing_class = tokenizer or source.tokenizer
            return given, None
        if tokenizer is None:
            name = getattr(getattr(given, "config", None), "_name_or_path", "")
            if not name:
                raise UsageError("processing_class: missing; give the tokenizer of the model")
            self.processing_class = find_model(name, NullProgress(), None, trust).tokenizer
        self._config = given.config
        return type(given).__name__, given

    def _plan(self) -> Plan:
        """The recipe and the rows of the training."""
        rows = self.train_rows()
        length = length_of(self.args, self.batches, len(rows) if sized(self.train_dataset) else None)
        context = context_length(self._config)
        name = self._name if self._in_memory is None else f"{IN_MEMORY}{self._name}"
        mapping = recipe_of(self.args, length, name, self._lora, is_conversation(rows[0]), context)
        recipe = load_recipe(self.completed(mapping))
        return Plan(recipe, self.batches, length, rows)

    def train_rows(self) -> Sequence[Row]:
        """The rows to train on: as many of a stream as the training needs."""
        most = self.batches.prompts * self.batches.steps(max(1, self.args.max_steps))
        return rows_of(self.train_dataset, "train_dataset", most)

    def completed(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe with what the trainer's own arguments add."""
        return recipe

    def functions(self) -> list[RewardFunction]:
        """The reward functions, in order."""
        return []

    def local(self, ready: Any) -> Local | None:
        """What the run uses in this process; None for a method that scores nothing."""
        return None

    # TRL's interface.

    def train(self, resume_from_checkpoint: str | bool | None = None, **_: Any) -> TrainOutput:
        """Train. Returns the number of optimizer steps, the mean loss, and the metrics of the whole training.

        `resume_from_checkpoint`: True, or a folder in output_dir, continues the last run in output_dir; a run that is
        not there begins. Raises UsageError for arguments or rows that cannot be used, and when called again after it
        has returned.
        """
        if self.result is not None:
            raise UsageError("train(): has run; make a new trainer, with model=trainer.model to train it further")
        plan = self._plan()
        resume = resumes(self.args, resume_from_checkpoint)
        folder = run_folder(self.args, resume)
        for line in _announcement(plan, folder, self.ignored, self.peft_config):
            self.note(line)
        self.state.log_history = []
        if resume and (folder / "trainer_state.json").is_file():
            self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.moments.plan(plan.batches, plan.length, self.reward_names())
        started = time.monotonic()

        def ready(parts: RunComponents) -> None:
            self._sampler = Sampler(parts.policy, parts.engine, parts.sampling, parts.episodes)
            self.moments.begin()

        in_memory = None if self._in_memory is None else (self._in_memory, self.processing_class)
        rewards: Any = self.functions() or None
        self.result, stop = run_recipe(
            plan.recipe,
            progress=self._progress,
            reward=rewards,
            prompts=plan.rows,
            model=in_memory and in_memory[0],
            tokenizer=in_memory and in_memory[1],
            callbacks=[self.moments],
            out=folder,
            resume=resume,
            local=self.local(ready),
        )
        if self.result.summary.get("state") == "interrupted":
            stop.raise_for_python()
        return self._finish(plan, time.monotonic() - started)

    def _finish(self, plan: Plan, seconds: float) -> TrainOutput:
        """Give the script's model its new weights, log the summary, and upload the model if args ask for it."""
        if isinstance(self._given, PreTrainedModel) and self._lora is None and self.result is not None:
            weights = self.result.load_model().state_dict()
            with torch.no_grad():
                for name, target in self._given.state_dict().items():
                    target.copy_(weights[name].to(target.dtype))
        samples = self.state.global_step // plan.batches.updates * plan.batches.prompts * plan.batches.group
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": samples / seconds,
            "train_steps_per_second": self.state.global_step / seconds,
            "train_loss": self.moments.mean_loss,
        }
        self.moments.end(metrics)
        if self.result is not None:
            self.state.save_to_json(str(self.result.path / "trainer_state.json"))
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(self.state.global_step, self.moments.mean_loss, metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Evaluate. Raises UsageError: only trainers that sample have an evaluation."""
        raise UsageError(
            f"evaluate(): {type(self).__name__} has none; measure the model with gruppo.evaluate(model, task), or in "
            "training with the table [evaluation] of a recipe"
        )

    def reward_names(self) -> list[str]:
        """The names of the reward functions in metrics."""
        return []

    @property
    def running_model(self) -> Any:
        """The model in training, None before and after it."""
        return None if self._sampler is None or self.result is not None else self._sampler.policy.model

    @property
    def model(self) -> Any:
        """The model of the script; during training the policy, after it the trained model. Adapters are merged then."""
        if (running := self.running_model) is not None:
            return running
        if self.result is not None and not isinstance(self._given, PreTrainedModel):
            self._given = self.result.load_model(trust_remote_code=self.args.trust_remote_code)
        if isinstance(self._given, str):
            self._given = self._in_memory or load_in_memory(self._given, self.args.trust_remote_code)
        return self._given

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the trained model with its tokenizer and card; with LoRA the adapter, as in TRL. Before training, the
        start model."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        if self.result is None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return
        with tempfile.TemporaryDirectory(dir=folder) as building:
            written = export(
                self.result.path,
                Path(building) / "model",
                adapter=self._lora is not None,
                trust_remote_code=self.args.trust_remote_code,
                progress=False,
            )
            for path in written.path.iterdir():
                path.replace(folder / path.name)

    def push_to_hub(self, commit_message: str | None = "End of training", **options: Any) -> str:
        """Upload the trained model to the hub, as hub_model_id or the name of output_dir. Returns the commit's URL."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder)
            return upload(Path(folder), self.args, commit_message or "End of training", options)


def _announcement(plan: Plan, folder: Path, ignored: Sequence[str], peft_config: Any) -> Iterator[str]:
    """Lines that say how the batches come about, and which arguments are ignored."""
    updates = plan.batches.updates
    counted = f" of {updates} updates ({plan.length.steps * updates} of TRL's steps)" if updates > 1 else ""
    yield f"{plan.batches.sentence}; {plan.length.steps} steps{counted}; run folder: {folder}"
    if plan.recipe.model.lora is not None and plan.recipe.model.lora.base == "4bit":
        yield FORM
    dropout = ["lora_dropout"] if getattr(peft_config, "lora_dropout", 0.0) > 0 else []
    if names := [*ignored, *dropout]:
        yield f"Ignored, without effect here: {', '.join(names)}"

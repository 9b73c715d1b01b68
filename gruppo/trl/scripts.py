"""Command-line scripts: TRL's parser and the arguments of models and data sets."""

from __future__ import annotations

import os
import sys
from argparse import Action
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser

from gruppo.errors import UsageError
from gruppo.trl.quantization import REFUSED

if TYPE_CHECKING:
    from datasets import DatasetDict
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


@dataclass
class ScriptArguments:
    """Where the rows come from. `dataset_config`: the name of a configuration of the data set."""

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_streaming: bool = False
    ignore_bias_buffers: bool = False


@dataclass
class ModelConfig:
    """Which model is trained, and how. See `get_quantization_config` for quantized weights."""

    model_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: str | None = "float32"
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None
    torch_dtype: str | None = None


@dataclass
class DatasetConfig:
    """One data set of a mixture: arguments of `datasets.load_dataset`, the `columns` to keep, and its share."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """Several data sets as one. `test_split_size`: rows, or the share of rows, that become the split "test"."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    streaming: bool = False
    test_split_size: float | None = None

    def __post_init__(self) -> None:
        self.datasets = [DatasetConfig(**one) if isinstance(one, dict) else one for one in self.datasets]


class TrlParser(HfArgumentParser):
    """A parser of dataclasses, with `--config FILE` for a YAML file whose values are the defaults of the rest.

    A mapping `env` in the file sets environment variables.
    """

    def __init__(self, dataclass_types: Any = None, **options: Any) -> None:
        """Raises UsageError for a dataclass with a field called config."""
        types = [] if dataclass_types is None else dataclass_types
        types = list(types) if isinstance(types, Iterable) else [types]
        if wrong := [kind.__name__ for kind in types if "config" in kind.__dataclass_fields__]:
            raise UsageError(f"{wrong[0]}: has a field config, which is the name of the option for a file; rename it")
        super().__init__(types, **options)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """One instance of each dataclass, from the command line or `args`, and from the file that it names.

        With `return_remaining_strings`, what was not understood follows as a list; with `separate_remaining_strings`,
        as one list of the file and one of the command line. Raises UsageError for a file that is no YAML mapping, and
        with `fail_with_unknown_args` for unknown names in it.
        """
        given = list(sys.argv[1:] if args is None else args)
        unknown: list[str] = []
        if "--config" in given:
            place = given.index("--config")
            values = _read_config(given[place + 1] if place + 1 < len(given) else "")
            del given[place : place + 2]
            unknown = self.set_defaults_with_config(**values)
        parsed: tuple[Any, ...] = self.parse_args_into_dataclasses(
            args=given, return_remaining_strings=return_remaining_strings
        )
        if return_remaining_strings:
            *found, rest = parsed
            return (*found, unknown, rest) if separate_remaining_strings else (*found, [*unknown, *rest])
        if unknown and fail_with_unknown_args:
            raise UsageError(f"config: unknown arguments {' '.join(unknown)}; remove them, or add them to a dataclass")
        return parsed

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Make values the defaults of their arguments, which are then not required. Returns the others as options."""
        known = {action.dest: action for action in self._all_actions()}
        for name, value in values.items():
            if name in known:
                known[name].default, known[name].required = value, False
        return [text for name, value in values.items() if name not in known for text in (f"--{name}", str(value))]

    def _all_actions(self) -> Iterator[Action]:
        """The options of this parser and of its subparsers."""
        for action in self._actions:
            if isinstance(action.choices, dict):
                for parser in action.choices.values():
                    yield from parser._actions
            yield action


def _read_config(path: str) -> dict[str, Any]:
    """The values of a configuration file. Sets the environment variables in it."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UsageError(f"config = {path}: cannot be read ({error}); give a YAML file") from error
    if not isinstance(values, dict):
        raise UsageError(f"config = {path}: is no mapping; write lines like learning_rate: 1.0e-6")
    variables = values.pop("env", {})
    if not isinstance(variables, dict):
        raise UsageError(f"config = {path}: env = {variables!r}: must be a mapping of names to values")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return values


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """The adapters that the arguments ask for, None without `use_peft`."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    targets: Any = model_args.lora_target_modules
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=targets[0] if isinstance(targets, list) and targets == ["all-linear"] else targets,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        task_type=model_args.lora_task_type,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The `quantization_config` of 4-bit weights under adapters; None if the arguments ask for no quantized weights.

    Raises UsageError if the arguments ask for 8-bit weights.
    """
    if model_args.load_in_8bit:
        raise UsageError(f"load_in_8bit = True: {REFUSED}")
    if not model_args.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=model_args.bnb_4bit_quant_type)


def get_kbit_device_map() -> None:
    """None: gruppo places the model on its device."""


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict:
    """The data sets of a mixture, one after the other, as the split "train", and "test" with `test_split_size`.

    With `fraction`, each data set gives its share, and as many rows as the smallest allows. Raises UsageError without a
    data set, and if only some have a fraction.
    """
    import datasets

    parts: list[Any] = []
    for one in mixture_config.datasets:
        part: Any = datasets.load_dataset(
            one.path, one.name, data_dir=one.data_dir, data_files=one.data_files, split=one.split,
            streaming=mixture_config.streaming,
        )  # fmt: skip
        parts.append(part if one.columns is None else part.select_columns(one.columns))
    if not parts:
        raise UsageError("datasets: missing; name at least one data set, or write dataset_name")
    fractions = [one.fraction for one in mixture_config.datasets if one.fraction is not None]
    if fractions and (len(fractions) < len(parts) or mixture_config.streaming):
        raise UsageError("fraction: give every data set one, or none; streams have no fraction")
    if fractions:
        shares = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share > 0)
        parts = [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]
    whole: Any = datasets.concatenate_datasets(parts)
    if mixture_config.test_split_size is not None:
        split: DatasetDict = whole.train_test_split(test_size=mixture_config.test_split_size)
        return split
    return datasets.DatasetDict({"train": whole})

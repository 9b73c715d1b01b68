"""Interface of what samples the completions of a recipe with an environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gruppo.engines.base import Engine, SamplingParams
from gruppo.types import Completion, Prompt
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gruppo.data.tokenization import ToolTexts


ROLLOUT_FUNC = f"{IN_MEMORY}rollout_func"  # name of the environment of a recipe whose completions a function samples


class Episodes(ABC):
    """Samples completions that are not the model's alone.

    `weight`: the weight of the environment's reward, None if it gives none.
    """

    weight: float | None

    def sample(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        streams: Sequence[Sequence[tuple[int, ...]]],
        options: SamplingParams,
        progress: Progress,
        stop: Stop,
        label: str = "Sampling",
    ) -> list[list[Completion]]:
        """Sample one completion per random stream for every prompt, as `gruppo.rollout.sampling.sample_groups` does.
        `play` also returns the prompts."""
        return self.play(engine, prompts, streams, options, progress, stop, label)[1]

    @abstractmethod
    def play(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        streams: Sequence[Sequence[tuple[int, ...]]],
        options: SamplingParams,
        progress: Progress,
        stop: Stop,
        label: str = "Sampling",
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """Sample one completion per random stream for every prompt. Returns the prompts that were used, with token ids
        that all completions of a group follow, and their completions."""

    @abstractmethod
    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Have `notify` called with a description whenever a process has to be started again."""


class Opened(Protocol):
    """The environment of a recipe before its model is loaded."""

    @property
    def gives_reward(self) -> bool:
        """Whether it scores completions."""

    @property
    def digests(self) -> list[str]:
        """Hashes of its code."""

    def tools(self, tokenizer: PreTrainedTokenizerBase) -> ToolTexts | None:
        """The description of its tools in prompts, for `gruppo.data.tokenization.tokenize_part`."""

    def episodes(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], prompts: Iterable[Prompt]
    ) -> Episodes:
        """What samples with it. Raises UsageError if that is not possible for these prompts."""


class RecordedFunction(Episodes):
    """Stands for a function that sampled the completions of a run whose steps are reproduced. See `Opened` and
    `Episodes`: nothing is sampled."""

    gives_reward = False
    weight = None
    digests: ClassVar[list[str]] = []

    def tools(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """There are none."""

    def episodes(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], prompts: Iterable[Prompt]
    ) -> RecordedFunction:
        """See `Opened`."""
        return self

    def play(self, *_: Any) -> tuple[list[Prompt], list[list[Completion]]]:
        """See `Episodes`."""
        raise AssertionError("nothing is sampled")

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """Does nothing: there is no process."""

"""Methods of transformers' Trainer that scripts call around a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from gruppo.trl.callbacks import Moments, check_callback
from gruppo.trl.configs import TrainingArguments
from gruppo.utils.progress import Progress


class Familiar:
    """What is the same for every trainer, and needs no model."""

    args: TrainingArguments
    state: TrainerState
    moments: Moments
    processing_class: Any
    _progress: Progress

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.processing_class

    def note(self, text: str) -> None:
        """Show a line, unless args.disable_tqdm."""
        self._progress.note(text)

    @property
    def hub_model_id(self) -> str:
        """The repository of `push_to_hub`."""
        return self.args.hub_model_id or Path(self.args.output_dir or "model").name

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Does nothing: `save_model` writes a card."""

    def save_state(self) -> None:
        """Write `state` to output_dir/trainer_state.json."""
        Path(self.args.output_dir or ".").mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(Path(self.args.output_dir or ".") / "trainer_state.json"))

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add a line to `state.log_history`, and call on_log."""
        self.moments.log(logs)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Show metrics."""
        self._progress.note(f"{split}: " + ", ".join(f"{name} {value}" for name, value in metrics.items()))

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write metrics to output_dir/SPLIT_results.json; with `combined` also to all_results.json."""
        folder = Path(self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}_results.json").write_text(json.dumps(dict(metrics), indent=4, default=str))
        if combined:
            path = folder / "all_results.json"
            before = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps({**before, **metrics}, indent=4, default=str))

    def add_callback(self, callback: Any) -> None:
        """Add a callback, an instance or a class."""
        self.moments.callbacks.append(check_callback(callback))

    def pop_callback(self, callback: Any) -> Any:
        """Remove and return a callback, given or by class; None if there is none."""
        for one in self.moments.callbacks:
            if one is callback or type(one) is callback:
                self.moments.callbacks.remove(one)
                return one
        return None

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, given or by class."""
        self.pop_callback(callback)

    def is_world_process_zero(self) -> bool:
        """True: there is one process."""
        return True

    is_local_process_zero = is_world_process_zero

    def end(self) -> None:
        """Does nothing: a run ends with `train`."""

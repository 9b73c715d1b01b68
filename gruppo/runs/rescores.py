"""Completions of a run that were scored with another reward: agreement, disagreements and changed groups.

`gruppo rescore` makes and writes the table; anything that can read run folders can read it.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.errors import UsageError
from gruppo.runs.agreement import Agreement, agreement, are_equal, ranking_changes
from gruppo.runs.atomic import write_whole
from gruppo.runs.reading import read_table, reading, require_own
from gruppo.runs.tables import RESCORES, ROLLOUTS, versioned

if TYPE_CHECKING:
    import pandas as pd

_PLACE = ("step", "group", "completion")
_TEXTS = pa.schema([ROLLOUTS.field(name) for name in ("group", "completion", "prompt_id", "prompt", "columns", "text")])
_MOST_COMPLETIONS = 10_000  # of a group; every pair is compared


@dataclass
class Rescores:
    """The recorded and the new reward of each completion that was scored again.

    `path`: the run folder. `table`: one row per completion, with the columns of gruppo.runs.tables.RESCORES. `notes`:
    what was left out, in words.
    """

    path: Path
    table: pa.Table
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: str | Path, run: str | Path) -> Rescores:
        """Read what `gruppo rescore --out` wrote, about the run in the folder `run`. Raises UsageError if the file is
        not such a table."""
        path, folder = Path(file), Path(run)
        require_own(folder)
        table = read_table(path, RESCORES)
        with reading(path, "write it again with `gruppo rescore`"):
            if any(table[name].null_count for name in (*_PLACE, "prompt_id")):
                raise ValueError("a row without its place")
            for parts in set(table["reward_parts"].to_pylist()):
                dict(json.loads(parts))
        return cls(folder, table)

    def __repr__(self) -> str:
        """A few lines: the run, the rewards and how well they agree."""
        found, groups = self.agreement, self.group_figures()
        equal = "" if found.equal is None else f", {found.equal:.1%} equal"
        return (
            f"Rescores({str(self.path)!r}, {self.reward}: {found.count} completions compared{equal}; the order changes "
            f"in {groups['reordered']} of {groups['groups']} groups\n"
            "  .agreement, .frame(), .disagreements(), .changed_groups(), .write(file))"
        )

    @property
    def reward(self) -> str:
        """The names of the functions of the new reward."""
        parts = self.table["reward_parts"]
        return " + ".join(json.loads(parts[0].as_py())) if len(parts) else ""

    @property
    def against(self) -> str | None:
        """The part of the recorded reward that was compared; None for the total."""
        column = self.table["against"]
        return column[0].as_py() if len(column) else None

    @cached_property
    def agreement(self) -> Agreement:
        """The agreement of the recorded (first) and the new reward (second) over all completions that have both."""
        known = self._known
        return agreement(self._recorded[known], self._rescored[known])

    def excluded(self) -> dict[str, int]:
        """How many completions are not compared, because they have no recorded reward, no new one, or neither."""
        old, new = np.isnan(self._recorded), np.isnan(self._rescored)
        return {
            "recorded": int((old & ~new).sum()),
            "rescored": int((new & ~old).sum()),
            "both": int((old & new).sum()),
        }

    def failures(self, most: int = 3) -> list[tuple[str, int]]:
        """The most frequent reasons why completions have no new reward, with the number of completions."""
        reasons = Counter(why for why in self.table["failure"].to_pylist() if why is not None)
        return reasons.most_common(most)

    def frame(self) -> pd.DataFrame:
        """Every completion, one per row, with the columns of gruppo.runs.tables.RESCORES."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def disagreements(self, most: int = 100) -> pd.DataFrame:
        """The completions whose rewards differ, the largest difference first; at most `most`.

        `difference` is the new reward minus the recorded one. `prompt`, `columns` and `text` are read from the tables
        of the run; they are None if these have changed or are gone.
        """
        with np.errstate(over="ignore"):
            frame = self.frame().assign(difference=self._rescored - self._recorded)
        frame = frame[self._known & ~are_equal(self._recorded, self._rescored)]
        order = np.lexsort((*(frame[name] for name in reversed(_PLACE)), -frame["difference"].abs()))
        frame = frame.iloc[order[:most]].reset_index(drop=True)
        texts = self._texts(frame)
        columns = {name: [row.get(name) for row in texts] for name in ("prompt", "columns", "text")}
        return frame.assign(**columns).astype(dict.fromkeys(columns, object))

    def changed_groups(self) -> pd.DataFrame:
        """The groups in which the order of the completions changes, or that gain or lose nonzero advantages.

        The first have the largest share of pairs that change. The columns `pairs`, `changed`, `ordered`, `swapped` and
        `signs` are those of gruppo.runs.agreement.RankingChanges; `recorded_nonzero` and `rescored_nonzero` say
        whether a method whose baseline is the mean of the group has nonzero advantages with that reward.
        """
        groups = self._groups
        groups = groups[(groups["changed"] > 0) | (groups["recorded_nonzero"] != groups["rescored_nonzero"])]
        share = groups["changed"] / groups["pairs"].clip(lower=1)
        order = np.lexsort((groups["group"], groups["step"], -groups["signs"], -share))
        return groups.iloc[order].reset_index(drop=True)

    def group_figures(self) -> dict[str, int]:
        """Numbers of groups: all, those whose order changes, those with nonzero advantages by each reward, and those
        that gain or lose them; and of the pairs in them that both rewards order, and of these the swapped ones."""
        groups = self._groups
        old, new = groups["recorded_nonzero"], groups["rescored_nonzero"]
        figures = {
            "groups": len(groups),
            "reordered": (groups["changed"] > 0).sum(),
            "recorded_nonzero": old.sum(),
            "rescored_nonzero": new.sum(),
            "gain_nonzero": (new & ~old).sum(),
            "lose_nonzero": (old & ~new).sum(),
            "ordered_pairs": groups["ordered"].sum(),
            "swapped_pairs": groups["swapped"].sum(),
        }
        return {name: int(value) for name, value in figures.items()}

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "run": str(self.path),
            "reward": self.reward,
            "against": self.against,
            "completions": len(self.table),
            "excluded": self.excluded(),
            "failures": [{"failure": why, "completions": count} for why, count in self.failures()],
            "agreement": asdict(self.agreement),
            "groups": self.group_figures(),
            "notes": self.notes,
        }

    def write(self, file: str | Path) -> None:
        """Write every row to a Parquet file, whole or not at all."""
        stream = io.BytesIO()
        content = self.table.replace_schema_metadata(versioned(RESCORES).metadata)
        pq.write_table(content, stream, compression="zstd", write_page_checksum=True)
        write_whole(Path(file), stream.getvalue())

    @cached_property
    def _recorded(self) -> np.ndarray:
        return self._values("recorded")

    @cached_property
    def _rescored(self) -> np.ndarray:
        return self._values("rescored")

    @property
    def _known(self) -> np.ndarray:
        """Whether each completion has both rewards."""
        known: np.ndarray = ~np.isnan(self._recorded) & ~np.isnan(self._rescored)
        return known

    def _values(self, name: str) -> np.ndarray:
        """A column of rewards; NaN for excluded completions."""
        values: np.ndarray = self.table[name].to_numpy().astype(float)
        return np.where(np.isfinite(values), values, np.nan)

    @cached_property
    def _groups(self) -> pd.DataFrame:
        """Every group, with its `RankingChanges`. Groups of one size are compared at once."""
        import pandas as pd

        step, group, completion = (self.table[name].to_numpy() for name in _PLACE)
        order = np.lexsort((completion, group, step))
        new = np.ones(len(order), dtype=bool)
        new[1:] = (np.diff(step[order]) != 0) | (np.diff(group[order]) != 0)
        starts = np.flatnonzero(new)
        sizes = np.diff(np.append(starts, len(order)))
        if len(sizes) and sizes.max() > _MOST_COMPLETIONS:
            raise UsageError(f"{self.path}: a group has {sizes.max()} completions; at most 10000 can be compared")
        names = ("pairs", "changed", "ordered", "swapped", "signs")
        frames = []
        for size in np.unique(sizes):
            places = order[starts[sizes == size][:, None] + np.arange(size)]
            found = ranking_changes(self._recorded[places], self._rescored[places])
            first = places[:, 0]
            columns = {"step": step[first], "group": group[first], "prompt_id": self.table["prompt_id"].take(first)}
            columns |= {"completions": np.full(len(first), size), **{name: getattr(found, name) for name in names}}
            columns |= dict(zip(("recorded_nonzero", "rescored_nonzero"), found.nonzero, strict=True))
            frames.append(pd.DataFrame(columns))
        empty = pd.DataFrame(columns=["step", "group", "prompt_id", "completions", *names], dtype=int)
        empty = empty.assign(recorded_nonzero=False, rescored_nonzero=False)
        return pd.concat(frames, ignore_index=True) if frames else empty

    def _texts(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        """The rows of the run's tables with the texts of these rows; an empty one where there is none."""
        texts: dict[tuple[Any, ...], dict[str, Any]] = {}
        for step, members in rows.groupby("step"):
            try:
                table = read_table(self.path / "rollouts" / f"step-{step:06d}.parquet", _TEXTS)
            except UsageError:
                continue
            wanted = set(_keys(members, ("group", "completion", "prompt_id")))
            texts |= {
                (step, *key): row
                for row in table.to_pylist()
                if (key := (row["group"], row["completion"], row["prompt_id"])) in wanted
            }
        return [texts.get(key, {}) for key in _keys(rows, (*_PLACE, "prompt_id"))]


def _keys(rows: pd.DataFrame, names: Iterable[str]) -> list[tuple[Any, ...]]:
    return list(rows[list(names)].itertuples(index=False, name=None))

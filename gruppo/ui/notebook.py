"""The token view of a group in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gruppo.ui.inline import assets
from gruppo.ui.links import Links
from gruppo.ui.pages import Templates
from gruppo.ui.text import number, shown
from gruppo.ui.tokens import group_data

HEIGHT = 640  # pixels
LONGEST = 200  # characters of a completion as text


@dataclass(frozen=True, repr=False)
class TokenView:
    """A group, token by token. A notebook shows it in a frame of its own, whose scripts reach nothing outside of it.

    `data`: see `gruppo.ui.tokens.group_data`.
    """

    title: str
    data: dict[str, Any]

    @classmethod
    def of(cls, run: Path, step: int, group: int) -> TokenView:
        """The view of a group of a run. Raises UsageError if the step has no such group, or its table is damaged."""
        return cls(f"{run.name}: step {step}, group {group}", group_data(run, step, group))

    @property
    def html(self) -> str:
        """The view as a page that needs no other file."""
        values = assets(("text.js", "tokens.js", "view.js"), ("style.css", "tokens.css"))
        return Templates(Links()).render("view.html", title=self.title, data=self.data, **values)

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{HEIGHT}px;border:0;resize:vertical"
        return (
            f'<iframe title="{escape(shown(self.title))}" sandbox="allow-scripts" style="{style}" '
            f'srcdoc="{escape(self.html)}"></iframe>'
        )

    def __repr__(self) -> str:
        """The prompt, and a line for each completion with its reward."""
        prompt = self.data["prompt"]
        asked = (
            prompt["text"]
            if prompt["messages"] is None
            else prompt["messages"][-1]["text"]
            if prompt["messages"]
            else ""
        )
        lines = [shown(self.title), f"  {shown(asked, LONGEST)}"]
        for one in self.data["completions"]:
            reward = one["reward"]
            words = "excluded" if reward is None else number(reward) if isinstance(reward, float) else str(reward)
            lines.append(f"  #{one['number']}  {words:>8}  {one['tokens']:>5} tokens  {shown(one['text'], LONGEST)}")
        page = self.data["page"]
        if page["shown"] < page["total"]:
            lines.append(f"  {page['total'] - page['shown']} more completions")
        return "\n".join(lines)

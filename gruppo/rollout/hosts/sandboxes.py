"""Sandboxes for model-written code on the reward hosts."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from gruppo.config.sections import Environment
from gruppo.errors import RunError, UsageError
from gruppo.rollout.workers.worker_set import MOST_LOST

if TYPE_CHECKING:
    from gruppo.rollout.hosts.hosts import Hosts
    from gruppo.rollout.hosts.member import Member


class Sandboxes:
    """See `gruppo.rollout.environments.python_tool.Pool`. Sessions take turns on the hosts that are there."""

    def __init__(self, hosts: Hosts, settings: Environment) -> None:
        """Raises UsageError if a host cannot have sandboxes."""
        self.hosts, self.settings = hosts, settings
        self._numbers = itertools.count()
        asked = [(member, call(member, "open_sandboxes", settings)) for member in hosts.members]
        for member, task in asked:
            try:
                why = ray.get(task)
            except RayActorError as error:
                raise RunError(f"cluster.reward_hosts: {member.name()}: {member.cause(error)}") from error
            if why:
                raise UsageError(f"{member.name()}: {why}")

    def session(self) -> Session:
        """A session on a host that it gets with its first block."""
        return Session(self, next(self._numbers))

    def close(self) -> None:
        """The hosts end their sandboxes."""


class Session:
    """See `gruppo.rollout.environments.python_tool.Session`. If its host is lost, its blocks are run again on another
    one."""

    def __init__(self, pool: Sandboxes, number: int) -> None:
        self._pool, self._number = pool, number
        self._blocks: list[str] = []
        self._at: Any = None  # the actor that has the session

    def run(self, code: str) -> Any:
        """Run a block, and wait for its end. Raises RunError if no interpreter starts, or no host is left."""
        self._blocks.append(code)
        why: Exception | None = None
        for _ in range(MOST_LOST):
            member = self._host()
            again = [code] if member.actor is self._at else self._blocks
            self._at = member.actor
            try:
                with self._pool.hosts.running_block(member):
                    for block in again:
                        done = ray.get(call(member, "run_block", self._pool.settings, self._number, block))
            except RayActorError as error:
                why = error
                self._pool.hosts.wait_until(partial(self._is_replaced, member))
                continue
            if done.ran is None:
                raise RunError(done.why)
            return done.ran
        raise RunError(f"a Python block: its reward host was lost {MOST_LOST} times; the last time: {why}")

    def _host(self) -> Member:
        hosts = self._pool.hosts
        hosts.wait_until(lambda: any(member.ready for member in hosts.members))
        there = [member for member in hosts.members if member.ready] or hosts.members
        return next((one for one in there if one.actor is self._at), there[self._number % len(there)])

    def _is_replaced(self, member: Member) -> bool:
        """Whether the thread of the hosts has seen that a host is lost, too."""
        return member.actor is not self._at

    def close(self) -> None:
        """End the interpreter."""
        for member in self._pool.hosts.members:
            if member.ready and member.actor is self._at:
                call(member, "end_session", self._number)


def call(member: Member, method: str, *arguments: Any) -> Any:
    """A call of a host that waits for no other one."""
    return getattr(member.actor, method).options(concurrency_group="blocks").remote(*arguments)

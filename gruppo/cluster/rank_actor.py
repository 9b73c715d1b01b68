"""The process of a rank that rank 0 has started: an actor of Ray. It ends with the leader."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from ray.util import get_node_ip_address

from gruppo.actors.process import Hello
from gruppo.cluster.follower import follow
from gruppo.cluster.joining import Rendezvous, joined, open_store
from gruppo.config.recipe import Recipe
from gruppo.errors import error_line

HERE = "here"  # in the store: begins the keys of ranks that are about to join


class RankActor:
    """Methods that the leader calls, one after the other."""

    def hello(self, folder: str) -> Hello:
        """Who this is. `folder`: the leader's working directory, which relative paths of the run begin at."""
        os.chdir(folder)
        return Hello.of_this_process()

    def follow(self, recipe: Recipe, rank: int, size: int, store: tuple[str, int], address: str | None) -> str:
        """Take part in the run until it ends. Returns why this rank has left before that, "" if it has not.

        `store`: host and port of the leader's store. `address`: of this rank; None for the one that Ray knows.
        """
        assert recipe.cluster is not None
        try:
            patience = timedelta(seconds=recipe.cluster.patience)
            shared = open_store(*store, patience, leads=False)
            shared.set(f"{HERE}/{rank}", "")
            with joined(recipe, Rendezvous(rank, size, shared, address=address or get_node_ip_address())) as ranks:
                follow(ranks)
        except SystemExit:
            return "another rank has ended"
        except Exception as error:  # noqa: BLE001  the leader reports it
            sys.stderr.write(f"gruppo: rank {rank}: {error_line(error)}\n")
            return error_line(error)
        return ""

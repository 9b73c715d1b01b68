"""A reward function passed from Python that has changed is noticed; one that has not is recognized in every process."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import pytest

from gruppo.rewards.identity import code_digest, old_digest
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.training.changes import Changes


def of_text(text: str) -> Any:
    """The object `f` that a program defines, as in an interactive session."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(text, scope)
    return scope["f"]


def digest(text: str) -> str:
    pickled = cloudpickle.dumps(of_text(text))
    return code_digest(pickled, cloudpickle.loads(pickled))


CHANGED = {
    "constant": ("f = lambda completions: [1.0]", "f = lambda completions: [2.0]"),
    "text": ("f = lambda completions, **_: ['a']", "f = lambda completions, **_: ['b']"),
    "kind of constant": ("f = lambda completions: [1]", "f = lambda completions: [1.0]"),
    "default": ("def f(completions, k=1): return k", "def f(completions, k=2): return k"),
    "keyword default": ("def f(completions, *, k=1): return k", "def f(completions, *, k=2): return k"),
    "closure": ("f = (lambda k: lambda completions: k)(1)", "f = (lambda k: lambda completions: k)(2)"),
    "nested code": (
        "def f(completions): return [(lambda x: x + 1)(0)]", "def f(completions): return [(lambda x: x + 2)(0)]"
    ),
    "comprehension": ("def f(c): return [x in {'a'} for x in c]", "def f(c): return [x in {'b'} for x in c]"),
    "helper": ("def g(): return 1\ndef f(c): return g()", "def g(): return 2\ndef f(c): return g()"),
    "helper of a helper": (
        "def h(): return 1\ndef g(): return h()\ndef f(c): return g()",
        "def h(): return 2\ndef g(): return h()\ndef f(c): return g()",
    ),
    "global": ("K = [1, {'a': (2,)}]\ndef f(c): return K", "K = [1, {'a': (3,)}]\ndef f(c): return K"),
    "pattern": (
        "import re\nK = re.compile('a')\ndef f(c): return K", "import re\nK = re.compile('b')\ndef f(c): return K"
    ),
    "partial": (
        "from functools import partial\ndef g(c, k): return k\nf = partial(g, k=1)",
        "from functools import partial\ndef g(c, k): return k\nf = partial(g, k=2)",
    ),
    "attribute": (
        "class A:\n  def __init__(s, k): s.k = k\n  def __call__(s, c): return s.k\nf = A(1)",
        "class A:\n  def __init__(s, k): s.k = k\n  def __call__(s, c): return s.k\nf = A(2)",
    ),
    "method": (
        "class A:\n  def __call__(s, c): return 1\nf = A()", "class A:\n  def __call__(s, c): return 2\nf = A()"
    ),
    "bound method": (
        "class A:\n  k = 1\n  def g(s, c): return s.k\nf = A().g",
        "class A:\n  k = 2\n  def g(s, c): return s.k\nf = A().g",
    ),
    "array": (
        "import numpy as np\nK = np.array([1, 2])\ndef f(c): return K",
        "import numpy as np\nK = np.array([1, 3])\ndef f(c): return K",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_noticed(name: str) -> None:
    before, after = CHANGED[name]
    assert digest(before) == digest(before)
    assert digest(before) == digest("\n\n# a comment, and other line numbers\n" + before)
    assert digest(before) != digest(after)


def test_functions_that_call_each_other_and_values_that_contain_themselves() -> None:
    assert digest("def g(c): return f(c)\ndef f(c): return g(c)")
    assert digest("K = []\nK.append(K)\ndef f(c): return K")
    assert digest("K = list(range(100000))\nD = {k: (k,) for k in K}\ndef f(c): return K, D")


def test_the_digest_is_the_same_in_every_process() -> None:
    program = (
        "import cloudpickle\nfrom gruppo.rewards.identity import code_digest\n"
        "K = {'a', 'b', 'c', ('d', 1), frozenset({'x', 'y'})}\n"
        "def f(completions): return [x in {'p', 'q', 'r'} for x in K]\n"
        "pickled = cloudpickle.dumps(f)\nprint(code_digest(pickled, cloudpickle.loads(pickled)))\n"
    )
    found = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                       env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)}).stdout
        for seed in range(3)
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(
    "function", [lambda completions, **_: [0.5] * len(completions), partial(re.match, "a")], ids=["lambda", "partial"]
)
def test_folders_of_earlier_versions_have_hashes_by_the_old_rule(function: Callable) -> None:
    """A function is compared by the old rule, and its hash by the new one is stored from then on."""
    code = getattr(function, "__code__", None)
    pickled = cloudpickle.dumps(function)
    old = hashlib.sha256(pickled if code is None else code.co_code + repr(code.co_names).encode()).hexdigest()
    assert old_digest(function) == (old if code else None)
    changes, now = Changes(), code_digest(pickled, function)
    changes.compare_code([old], [now], ["f"], [function])
    assert (changes.found == []) == (code is not None)
    assert changes.environment == {"rewards_sha256": [now]}
    other = Changes()
    other.compare_code([now], [now], ["f"], [function])
    assert (other.found, other.environment) == ([], {})


def test_a_changed_constant_reaches_the_pool() -> None:
    digests = []
    for value in (1.0, 2.0):
        with RewardPool([lambda completions, value=value, **_: [value] * len(completions)], [], [], workers=1) as pool:
            digests.append(pool.digests)
    assert digests[0] != digests[1]

"""Shared fixtures: a tiny Llama with a character tokenizer, in memory and on disk, and hand-made groups."""

from __future__ import annotations

import gc
import os
import random
import string
import sys
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gruppo.errors import speak_command_line
from gruppo.models.compatibility import wrap_model
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import save_model
from gruppo.types import Completion, Group, Prompt, Reward
from tests.prestarted import prestarted_workers

torch.set_num_threads(1)
device = "cpu"  # of the models that `make_policy` makes; see --device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tiny models; see benchmarks/accelerator")


def pytest_configure(config: pytest.Config) -> None:
    global device
    device = config.getoption("--device")


def pytest_collection_finish() -> None:
    """Keep modules and tests, which live until the end, out of garbage collection: a tenth of all time went there."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Record how many property-based examples a test tried, for the summary at the end of the session."""
    if call.when == "call" and item.nodeid.startswith("tests/fuzz/"):
        from tests import fuzzing

        item.user_properties.append(("examples", fuzzing.tried))
        fuzzing.tried = 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many property-based examples were tried, over all processes."""
    reports = [
        report
        for entries in terminalreporter.stats.values()
        for report in entries
        if getattr(report, "when", "") == "call"
    ]
    count = sum(value for report in reports for name, value in report.user_properties if name == "examples")
    if count:
        terminalreporter.write_line(f"{count:,} examples tried")


@pytest.fixture(autouse=True)
def words_of_python() -> None:
    """Messages name arguments of Python functions, even if the test before ran the command line in this process."""
    speak_command_line(False)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """os.fsync only checks its argument in this process: half of the time of a small run would be spent on it.

    Programs that tests start sync as usual. tests/torture.py checks what is synced before it gets its name.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


def _unchanged_path() -> Iterator[None]:
    """A reward "tests/file.py:function" puts tests/ on sys.path, where tests/gguf and tests/trl hide the libraries."""
    before = list(sys.path)
    yield
    sys.path[:] = before


unchanged_path = pytest.fixture(autouse=True)(_unchanged_path)
unchanged_path_of_module = pytest.fixture(autouse=True, scope="module")(_unchanged_path)  # by fixtures of a module


END = 0
LETTERS = string.ascii_lowercase + string.digits + " +-=?"
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, and a character for each of the 48 ids of the tiny model."""
    vocabulary = {"<eos>": END} | {letter: token_id for token_id, letter in enumerate(LETTERS + "<>¡¢£¥", start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def make_policy(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> LanguageModel:
    """A two-layer Llama with grouped-query attention; the padding token is the EOS token."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": END,
        "pad_token_id": END,
        "bos_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return wrap_model(model, make_tokenizer(), dtype)


@pytest.fixture(scope="session")
def policy() -> LanguageModel:
    return make_policy()


@pytest.fixture(scope="session")
def policy64() -> LanguageModel:
    return make_policy(torch.float64)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(make_policy(initializer_range=0.02), folder)
    return str(folder)


def make_completion(token_ids: list[int], finish: str = "stop", mask: list[bool] | None = None) -> Completion:
    loss_mask = mask or [True] * len(token_ids)
    return Completion(tuple(token_ids), (-1.0,) * len(token_ids), tuple(loss_mask), finish, 0, str(token_ids))  # type: ignore[arg-type]


def make_group(
    prompt: list[int], completions: list[list[int]], rewards: list[float | None], **columns: object
) -> Group:
    return Group(
        Prompt("t/0", "q", tuple(prompt), "t", columns),
        [make_completion(ids) for ids in completions],
        [Reward(reward, {}, None if reward is not None else "failed") for reward in rewards],
    )


def random_groups(seed: int = 0, groups: int = 3, size: int = 4, uneven: bool = True) -> list[Group]:
    """Groups with random tokens, lengths and rewards; no two rewards of a group are equal."""
    source = random.Random(seed)
    result = []
    for _ in range(groups):
        prompt = [source.randrange(1, 48) for _ in range(source.randrange(2, 9))]
        lengths = [source.randrange(1, 9) if uneven else 5 for _ in range(size)]
        completions = [[source.randrange(1, 48) for _ in range(length)] for length in lengths]
        result.append(make_group(prompt, completions, [source.gauss(0, 1) for _ in range(size)]))
    return result


@pytest.fixture(scope="module")
def quick_workers() -> Iterator[None]:
    """Reward processes are forked in a module that uses this; the starts of real ones are tested in
    tests/rollout/workers."""
    with prestarted_workers():
        yield


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    """Ray for the tests of a session, in an environment that has it (`make test-cluster`)."""
    from gruppo.actors.runtime import Runtime
    from gruppo.config.cluster_section import Cluster

    runtime = Runtime(Cluster(engines=16), False, 0)
    yield
    runtime.close()

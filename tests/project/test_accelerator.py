"""`make accelerator` on a CPU: the same code on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_checks_run_on_a_cpu_and_every_result_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/accelerator", "--device", "cpu", "--small"]
    command += ["--only", "gradient", "1.5b", "vllm"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "accelerator.json").read_text())
    assert {"torch", "transformers", "gruppo"} <= results["environment"]["packages"].keys()
    checks = results["checks"]
    assert checks["gradient"]["state"] == "passed"
    assert set(checks["gradient"]["figures"]) >= {"cpu float32", "sdpa float32", "sdpa bfloat16"}
    assert 0 < checks["gradient"]["figures"]["sdpa bfloat16"] < 0.1, "bfloat16 was not used, or is far off"
    trained = checks["1.5b"]["figures"]["auto"]
    assert trained["tokens"] > 0
    assert trained["forecast_over_peak"] > 0
    assert checks["vllm"] == {
        "question": checks["vllm"]["question"], "state": "skipped", "why": "vllm is not installed",
        "took": checks["vllm"]["took"],
    }  # fmt: skip
    table = (tmp_path / "accelerator.md").read_text()
    assert "| gradient | passed |" in table
    assert "| 1.5b, auto | " in table


def test_a_check_that_fails_keeps_its_error(tmp_path: Path) -> None:
    """There is no GPU with this name on a CPU's machine: the check fails, and so does the command."""
    command = [sys.executable, "benchmarks/accelerator", "--device", "mps", "--small", "--only", "gradient"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    row = json.loads((tmp_path / "accelerator.json").read_text())["checks"]["gradient"]
    assert row["state"] == "failed"
    assert "mps" in json.dumps(row["figures"])
    assert (tmp_path / "gradient.log").stat().st_size > 0

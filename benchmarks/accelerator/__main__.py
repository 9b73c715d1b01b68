"""Check and measure gruppo on a machine with a GPU: `make accelerator`, or `python benchmarks/accelerator`.

It needs torch, transformers and gruppo's small dependencies, and installs nothing; a folder of wheels can be put on the
path with --path. Every check runs in a process of its own, with a time limit. After each one, OUT/accelerator.json and
OUT/accelerator.md are written, and OUT keeps the log of every check. A check that cannot run says why.

`--device cpu --small` runs the same code on tiny shapes within minutes, as a test of this script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = "triton", "flash-attn", "liger-kernel", "vllm", "trl", "bitsandbytes", "torchao"  # packages


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "mps", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=9.5, help="checks that do not fit are not started")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="run these checks only")
    parser.add_argument("--path", action="append", default=[], metavar="FOLDER", help="also import from this folder")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "accelerator")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # run one check in this process
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    sys.path[:0] = [str(ROOT), *chosen.path]
    return run_check(chosen) if chosen.check else run_all(chosen)


def run_all(chosen: argparse.Namespace) -> int:
    """Run the checks one after another. The exit code is 1 if one failed."""
    from checks import CHECKS

    if unknown := set(chosen.only) - set(CHECKS):
        sys.exit(f"--only {min(unknown)}: there is no such check; there are {', '.join(CHECKS)}")
    started = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(chosen.device), "small": chosen.small, "checks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, check in CHECKS.items():
            if chosen.only and name not in chosen.only:
                continue
            left = 60 * chosen.minutes - (time.monotonic() - started)
            row = results["checks"][name] = {"question": check.question, "state": "not reached"}
            if left > 20:
                row |= one(name, min(left, check.seconds * (3 if chosen.small else 1)), chosen, scratch)
            write(results, chosen.out)
            print(f"{name:<10}{row['state']:<12}{row.get('took', 0):6.1f} s  {row.get('why', '')}", flush=True)
    print(f"\n{(chosen.out / 'accelerator.md').read_text()}")
    return int(any(row["state"] == "failed" for row in results["checks"].values()))


def one(name: str, seconds: float, chosen: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Run a check in a process of its own. Returns its state, its figures, and the end of its log if it failed."""
    command = [sys.executable, __file__, "--check", name, "--device", chosen.device, "--out", scratch]
    command += ["--small"] if chosen.small else []
    command += [part for folder in chosen.path for part in ("--path", folder)]
    log, start = chosen.out / f"{name}.log", time.monotonic()
    result = Path(scratch) / f"{name}.json"
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
            why = f"the process ended with {code} before it had a result"
        except subprocess.TimeoutExpired:
            why = f"not done after {seconds:.0f} s"
    row = json.loads(result.read_text()) if result.exists() else {"state": "failed", "why": why}
    if row["state"] == "failed":
        row["log"] = log.read_text(errors="replace")[-4000:]
    return {**row, "took": time.monotonic() - start}


def run_check(chosen: argparse.Namespace) -> int:
    """Run one check in this process, and write its result into the folder."""
    from checks import CHECKS, CheckFailedError, CheckSkippedError, Place

    row: dict[str, Any]
    try:
        row = {"state": "passed", "figures": CHECKS[chosen.check].run(Place(chosen.device, chosen.small, chosen.out))}
    except CheckSkippedError as reason:
        row = {"state": "skipped", "why": str(reason)}
    except CheckFailedError as problem:
        row = {"state": "failed", "why": str(problem), "figures": problem.figures}
    except Exception as error:  # noqa: BLE001 the report keeps what is needed to understand it
        row = {"state": "failed", "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    (chosen.out / f"{chosen.check}.json").write_text(json.dumps(row))
    print(json.dumps(row, indent=1))
    return 0


def environment(device: str) -> dict[str, Any]:
    """Versions and the machine."""
    import torch

    from gruppo.utils.system import describe

    there = device == "cuda" and torch.cuda.is_available()
    return {
        **describe(torch.device("cuda" if there else "cpu"), OPTIONAL),
        "cuda": torch.version.cuda,
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if there else None,
    }


def write(results: dict[str, Any], out: Path) -> None:
    """Write the JSON and the table."""
    (out / "accelerator.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "accelerator.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: a row for each check, and a row for each training run."""
    machine = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"{machine['accelerator'] or machine['processor']}; {versions}",
        "",
        "| check | result | seconds | |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in results["checks"].items():
        lines.append(f"| {name} | {row['state']} | {row.get('took', 0):.0f} | {row.get('why', row['question'])} |")
    columns = "generate", "score", "update", "load_weights", "step"
    lines += ["", f"| training | {' s | '.join(columns)} s | tokens/s | peak, GB | forecast / peak | nats |"]
    lines += ["| --- " * (len(columns) + 5) + "|"]
    for name, row in results["checks"].items():
        for backend, found in row.get("figures", {}).items():
            if isinstance(found, dict) and "peak_bytes" in found:
                seconds = " | ".join(f"{found['seconds'].get(column, 0):.2f}" for column in columns)
                lines.append(
                    f"| {name}, {backend} | {seconds} | {found['tokens_per_second']:,.0f} "
                    f"| {found['peak_bytes'] / 1e9:.1f} | {found['forecast_over_peak']:.2f} "
                    f"| {found['engine_trainer_nats']:.4f} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

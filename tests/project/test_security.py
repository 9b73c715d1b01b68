"""No pickles from files, no untrusted code, no listening sockets, no leaked secrets.

The source is scanned, and attacks are tried.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gruppo
from gruppo.config.loading import RecipeError, load_recipe
from gruppo.errors import UsageError
from gruppo.models.loading import find_model, load_model
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.training.api import train
from tests.small_runs import ROWS, recipe


@cache
def calls() -> list[tuple[Path, ast.Call, str]]:
    """Every call in the source, with the dotted name of the function that is called."""
    return [
        (path, node, ast.unparse(node.func))
        for path in sorted(Path("gruppo").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def argument(node: ast.Call, name: str) -> str | None:
    """Source of a keyword argument; None if it is not passed."""
    return next((ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == name), None)


def test_nothing_reads_a_pickle_from_a_file() -> None:
    """Pickles are read only from gruppo's own processes: calls of rewards and environments, conversations to render,
    reasoning-gym's rows, and what the leader tells the other ranks and the engines of a run."""
    readers = {
        f"{path}: {ast.unparse(node)}"
        for path, node, name in calls()
        if name.split(".")[-1] in {"load", "loads", "Unpickler", "read_pickle", "find_class"}
        and name.split(".")[0] not in {"json", "tomllib", "worker"}
    } - {
        "gruppo/data/loading.py: load(split, **options)",  # a user-defined function
        "gruppo/training/model_card.py: ModelCard.load(folder / 'README.md')",  # text
    }
    assert readers == {
        "gruppo/cluster/follower.py: pickle.loads(begin.models)",
        "gruppo/models/blueprint.py: pickle.loads(blueprint)",
        "gruppo/models/blueprint.py: pickle.loads(described(replace(policy, body=None, root=None), keep_buffers=True))",
        "gruppo/data/chat_template_main.py: pickle.loads(requests.recv_bytes())",
        "gruppo/rollout/environments/worker_main.py: pickle.loads(content)",
        "gruppo/rollout/workers/reward_main.py: pickle.loads(content)",
        "gruppo/rewards/loading.py: pickle.loads(source)",
        "gruppo/data/reasoning_gym.py: pickle.load(stream)",
        "gruppo/data/reasoning_gym.py: pickle.load(sys.stdin.buffer)",
        "gruppo/data/reasoning_gym.py: pickle.loads(parameters)",
    }


def test_forbidden_calls() -> None:
    """No calls that run code, read pickles, start a shell or listen on a socket."""
    forbidden = {"eval", "exec", "compile", "__import__", "system", "popen", "listen", "bind", "create_server",
             "serve_forever", "start_server",
             "HTTPServer", "init_process_group", "load_state_dict_from_url", "read_pickle"}  # fmt: skip
    allowed = {"re.compile", "torch.compile", "model.eval", "loaded[0].eval", "self._llama.eval"} | {
        f"inspect.signature({function}).bind" for function in ("method", "load", "load_benchmark", "tool", "kind")
    }
    found = {f"{path}: {name}" for path, _, name in calls() if name.split(".")[-1] in forbidden and name not in allowed}
    # Only the worker inside the sandbox runs code. Only the dashboard listens, and the ranks of a run, for each other.
    assert found == {f"gruppo/rollout/sandbox/worker_main.py: {name}" for name in ("exec", "eval", "compile")} | {
        *(f"gruppo/ui/server.py: found.{name}" for name in ("bind", "listen")),
        "gruppo/cluster/joining.py: dist.init_process_group",
    }
    assert not [
        f"{path}: {name}" for path, node, name in calls() if argument(node, "shell") or argument(node, "allow_pickle")
    ]
    assert not [f"{path}: {name}" for path, _, name in calls() if name in {"torch.load", "torch.save", "np.load"}]


def test_models_are_loaded_from_safetensors_and_without_their_code() -> None:
    loading = [call for call in calls() if call[2].endswith((".from_pretrained", ".from_config"))]
    loading = [call for call in loading if not call[2].startswith("type(given)")]  # in-memory model
    assert len(loading) >= 12
    trusted = {"False", "trust_remote_code", "trust"}
    with_code = [call for call in loading if not call[2].startswith(("peft.", "GenerationConfig."))]  # JSON
    assert not [
        f"{path}: {name}" for path, node, name in with_code if argument(node, "trust_remote_code") not in trusted
    ]
    weights = [call for call in loading if "output_loading_info" in ast.unparse(call[1]) or "Model" in call[2]]
    assert not [
        f"{path}: {name}"
        for path, node, name in weights
        if name.endswith("pretrained") and argument(node, "use_safetensors") != "True"
    ]


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.fixture
def pickled(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    return folder


def test_pickled_weights_are_refused_and_the_message_says_how_to_convert_them(pickled: Path) -> None:
    with pytest.raises(UsageError, match="save_pretrained"):
        find_model(str(pickled))
    (pickled / "other.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="Weights in pickles are never read"):
        load_model(find_model(str(pickled)), "cpu", "float32")
    (pickled / "other.safetensors").unlink()
    with pytest.raises(UsageError, match="pickles"):
        RewardPool(["classifier"], [], [], workers=1, options={"classifier": {"model": str(pickled)}})
    assert not Path("exploded").exists()


def test_an_adapter_in_a_model_folder_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m/adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(UsageError, match="also contains an adapter"):
        find_model(str(tmp_path / "m"))


@pytest.mark.parametrize("options", [{"data_files": "x.pkl"}, {"trust_remote_code": True}])
def test_pickled_data_and_data_sets_with_code_are_refused(
    options: dict, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Bomb()))
    name = "pandas" if "data_files" in options else tiny_folder
    monkeypatch.setattr("gruppo.data.hub.hub_reachable", lambda: True)
    data = {**recipe(tiny_folder), "task": {"name": name, "options": options}}
    with pytest.raises(UsageError):
        train(data, out=tmp_path / "run")
    assert not (tmp_path / "exploded").exists()


CODE = """from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path("code_ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own-kind"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def custom(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that contains its own code."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "custom"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-kind", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_runs_only_if_trust_remote_code_is_set(custom: Path, tmp_path: Path) -> None:
    settings = recipe(str(custom), run__steps=1)
    settings["reward"]["functions"] = [f"{Path(__file__).parents[1]}/rewards/functions.py:likes_letters"]
    with pytest.raises(UsageError, match=r"write model\.trust_remote_code = true"):
        train(settings, prompts=ROWS, out=tmp_path / "run")
    assert not Path("code_ran").exists()
    settings["model"]["trust_remote_code"] = True
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    assert Path("code_ran").exists()
    assert (result.path / "model/own.py").is_file(), "the saved model includes its code"
    Path("code_ran").unlink()

    with pytest.raises(UsageError, match="trust_remote_code=True"):
        result.load_model()
    # The recipe in the run folder trusts the code, but the folder may come from anyone.
    with pytest.raises(UsageError, match="trust"):
        gruppo.export(result.path, tmp_path / "out")
    assert not Path("code_ran").exists()
    assert isinstance(result.load_model(trust_remote_code=True), LlamaForCausalLM)
    gruppo.export(result.path, tmp_path / "out", trust_remote_code=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    trained = dict(result.load_model(trust_remote_code=True).named_parameters())
    assert all(torch.equal(weight, trained[name]) for name, weight in exported.named_parameters())


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/x", "a/b", "a\\b", "a\0b", "a\n", ".hidden", "", "x" * 101, "nul", "COM1.txt", "a.", "~", "-x"],
)
def test_the_name_of_a_run_cannot_escape_the_runs_folder(name: str) -> None:
    with pytest.raises(RecipeError, match=r"run\.name"):
        load_recipe({"run": {"name": name}, "model": {"name": "m"}})


def test_secrets_are_in_no_file_of_a_run(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "ANYTHING_ELSE"):
        monkeypatch.setenv(name, f"hidden-{name}")

    def prints(completions, **_):
        import os

        print(dict(os.environ))
        return [float(len(text)) for text in completions]

    train(recipe(tiny_folder, run__steps=1), reward=prints, prompts=ROWS, out=tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "GRUPPO_REWARD_PROCESS" in (tmp_path / "run/rewards.log").read_text()
    assert [path.name for path in files if b"hidden-" in path.read_bytes()] == []

"""No pickles from files, no code of strangers, nothing listening, no secrets: by the code, and by trying."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
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

CALLS = [
    (path, node)
    for path in sorted(Path("gruppo").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
]


def named(node: ast.Call) -> str:
    return ast.unparse(node.func)


def given(node: ast.Call, name: str) -> str | None:
    return next((ast.unparse(each.value) for each in node.keywords if each.arg == name), None)


def test_nothing_reads_a_pickle_from_a_file() -> None:
    """Those that are read come through pipes from our own processes: calls of rewards and environments, and
    reasoning-gym's rows."""
    reading = {
        f"{path}: {ast.unparse(node)}"
        for path, node in CALLS
        if named(node).split(".")[-1] in {"load", "loads", "Unpickler", "read_pickle", "find_class"}
        and named(node).split(".")[0] not in {"json", "tomllib", "worker"}
    } - {"gruppo/data/loading.py: load(split, **options)"}  # a user's function
    assert reading == {
        "gruppo/rollout/environments/worker_main.py: pickle.loads(content)",
        "gruppo/rollout/workers/reward_main.py: pickle.loads(content)",
        "gruppo/rewards/loading.py: pickle.loads(source)",
        "gruppo/data/reasoning_gym.py: pickle.load(stream)",
        "gruppo/data/reasoning_gym.py: pickle.load(sys.stdin.buffer)",
        "gruppo/data/reasoning_gym.py: pickle.loads(parameters)",
    }


def test_forbidden_calls() -> None:
    """Of what runs code, reads pickles, starts a shell, or listens."""
    words = {"eval", "exec", "compile", "__import__", "system", "popen", "listen", "bind", "create_server",
             "serve_forever", "start_server",
             "HTTPServer", "init_process_group", "load_state_dict_from_url", "read_pickle"}  # fmt: skip
    own = {"re.compile", "model.eval", "loaded[0].eval"} | {
        f"inspect.signature({each}).bind" for each in ("method", "load", "load_benchmark", "tool", "kind")
    }
    found = {
        f"{path}: {named(node)}"
        for path, node in CALLS
        if named(node).split(".")[-1] in words and named(node) not in own
    }
    # What runs in the sandbox, and there alone.
    assert found == {f"gruppo/rollout/sandbox/worker_main.py: {each}" for each in ("exec", "eval", "compile")}
    assert not [f"{path}: {named(node)}" for path, node in CALLS if given(node, "shell") or given(node, "allow_pickle")]
    assert not [
        f"{path}: {named(node)}" for path, node in CALLS if named(node) in {"torch.load", "torch.save", "np.load"}
    ]


def test_models_are_loaded_from_safetensors_and_without_their_code() -> None:
    loading = [(path, node) for path, node in CALLS if named(node).endswith((".from_pretrained", ".from_config"))]
    loading = [each for each in loading if not named(each[1]).startswith("type(given)")]  # of a model in memory
    assert len(loading) >= 12
    trusted = {"False", "trust_remote_code", "trust"}
    assert not [f"{path}: {named(n)}" for path, n in loading if given(n, "trust_remote_code") not in trusted]
    weights = [
        (path, node) for path, node in loading if "output_loading_info" in ast.unparse(node) or "Model" in named(node)
    ]
    assert not [f"{path}: {named(n)}" for path, n in weights
                if named(n).endswith("pretrained") and given(n, "use_safetensors") != "True"]  # fmt: skip


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


def test_pickled_weights_are_refused_with_the_way_to_convert_them(pickled: Path) -> None:
    with pytest.raises(UsageError, match="save_pretrained"):
        find_model(str(pickled))
    (pickled / "other.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="are pickles, which are never read"):
        load_model(find_model(str(pickled)), "cpu", "float32")
    (pickled / "other.safetensors").unlink()
    with pytest.raises(UsageError, match="pickles"):
        RewardPool(["classifier"], [], [], workers=1, options={"classifier": {"model": str(pickled)}})
    assert not Path("exploded").exists()


def test_adapter_in_a_models_folder_is_not_put_on_it(tiny_folder: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m/adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(UsageError, match="holds an adapter too"):
        find_model(str(tmp_path / "m"))


@pytest.mark.parametrize("options", [{"data_files": "x.pkl"}, {"trust_remote_code": True}])
def test_pickled_data_and_data_that_is_a_program_are_refused(
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
    """A model that comes with code of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "custom"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-kind", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_runs_only_where_it_is_asked_for_by_name(custom: Path, tmp_path: Path) -> None:
    settings = recipe(str(custom), run__steps=1)
    settings["reward"]["functions"] = [f"{Path(__file__).parent}/rewards/functions.py:likes_letters"]
    with pytest.raises(UsageError, match=r"write model\.trust_remote_code = true"):
        train(settings, prompts=ROWS, out=tmp_path / "run")
    assert not Path("code_ran").exists()
    settings["model"]["trust_remote_code"] = True
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    assert Path("code_ran").exists()
    assert (result.path / "model/own.py").is_file(), "the model is loadable with its code"
    Path("code_ran").unlink()

    with pytest.raises(UsageError, match="trust_remote_code=True"):
        result.load_model()
    with pytest.raises(UsageError, match="trust"):
        gruppo.export(result.path, tmp_path / "out")  # though the run's own recipe trusts it: the run may be anybody's
    assert not Path("code_ran").exists()
    assert isinstance(result.load_model(trust_remote_code=True), LlamaForCausalLM)
    gruppo.export(result.path, tmp_path / "out", trust_remote_code=True)
    held = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    trained = dict(result.load_model(trust_remote_code=True).named_parameters())
    assert all(torch.equal(each, trained[name]) for name, each in held.named_parameters())


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/x", "a/b", "a\\b", "a\0b", "a\n", ".hidden", "", "x" * 101, "nul", "COM1.txt", "a.", "~", "-x"],
)
def test_name_of_a_run_cannot_lead_out_of_runs(name: str) -> None:
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

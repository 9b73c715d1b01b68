"""The shape of a model: what a plan needs to know about it. Read from config.json; no weights are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from gruppo.errors import UsageError, error_line
from gruppo.utils.hub import hidden_bars, hub_problem, hub_reachable, split_revision, unreachable
from gruppo.utils.paths import is_dir, user_path

BYTES = 2  # of a weight or of a cached key or value: bfloat16

# Model types whose feed-forward block has two matrices. All others have three (a gate beside the way up).
_TWO_MATRICES = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "phi",
                 "stablelm_alpha", "starcoder2"}  # fmt: skip
# Model types whose position embeddings are weights: number of positions beyond max_position_embeddings.
_LEARNED_POSITIONS = {"gpt2": 0, "gpt_neo": 0, "gpt_bigcode": 0, "opt": 2}
_NAMES = {  # other names of a field in config.json
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("ffn_dim", "n_inner", "d_ff"),
    "max_position_embeddings": ("n_positions",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "moe_intermediate_size": (),
}
_REMEDY = "pass the number of its weights with --parameters"


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know about a model.

    `parameters`: all weights. `active`: weights that one token meets in matrix multiplications, without the embedding
    table. `experts`, `experts_per_token`: of a mixture of experts, else 0. `expert_parameters`: weights of all experts
    together.
    """

    name: str
    parameters: float
    active: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: float = 0.0

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in bfloat16."""
        return BYTES * self.parameters

    @property
    def cache_bytes(self) -> float:
        """Bytes of the keys and values of one token, in bfloat16: 2 · layers · kv_heads · head_dim numbers."""
        return 2.0 * BYTES * self.layers * self.kv_heads * self.head_dim

    def forward_flops(self, context: float) -> float:
        """Floating-point operations of a forward pass for one token that attends to `context` tokens.

        2 per weight, and 4 · layers · heads · head_dim per token attended to (scores and weighted sum).
        """
        return 2.0 * self.active + 4.0 * self.layers * self.heads * self.head_dim * context

    def read_bytes(self, tokens: float) -> float:
        """Bytes of weights that a pass over `tokens` independent tokens reads, at least once each.

        An expert is read if any token chooses it: a share of 1 − (1 − k/E)^tokens of the experts, if choices are even.
        """
        if not self.experts:
            return self.weight_bytes
        used = 1.0 - math.pow(1.0 - self.experts_per_token / self.experts, tokens)
        return BYTES * (self.parameters - self.expert_parameters * (1.0 - used))

    def lora_parameters(self, rank: int) -> float:
        """Weights of adapters of this rank on every linear layer outside the experts and the output head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        dense = 0 if self.experts else 3 * (self.hidden + self.feed_forward)
        return float(rank * self.layers * (attention + dense))


def typical_shape(parameters: float, active: float | None = None) -> ModelShape:
    """A shape for a model of which only the number of weights is known.

    Dense decoders have about 12 · layers · hidden² weights, a width of about 128 · layers, heads of 128 and 8 heads of
    keys and values. Raises UsageError unless 0 < active <= parameters.
    """
    if not 1e6 <= parameters <= 1e14:
        raise UsageError(
            f"--parameters {parameters:g}: must be a number of weights between 1e6 and 1e14; write e.g. 7.6e9"
        )
    if active is not None and not 1e6 <= active <= parameters:
        raise UsageError(
            f"--active-parameters {active:g}: must be between 1e6 and the number of all weights, {parameters:g}; write "
            "the weights that one token uses"
        )
    used = active or parameters
    layers = max(1, round((used / (12 * 128**2)) ** (1 / 3)))
    hidden = max(128, 128 * round((used / (12 * layers)) ** 0.5 / 128))
    heads = hidden // 128
    experts, per_token = (128, 8) if used < parameters else (0, 0)
    expert_parameters = (parameters - used) * experts / (experts - per_token) if experts else 0.0
    return ModelShape(
        f"{parameters:.3g} weights", parameters, used, layers, hidden, heads, min(8, heads), 128, 4 * hidden,
        experts, per_token, expert_parameters,
    )  # fmt: skip


def model_shape(name: str) -> ModelShape:
    """The shape of a model in a local folder or on the hub, from its config.json.

    A file in the hub's cache is used as it is; otherwise config.json alone is downloaded. Raises UsageError if there is
    none, or if it lacks a field.
    """
    return shape_of_config(_read_config(name), name)


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that the fields of a config.json give. Raises UsageError if one is missing."""
    text = config.get("text_config")
    values: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
    kind = str(values.get("model_type", ""))

    def field(key: str, default: int | None = None) -> int:
        for each in (key, *_NAMES.get(key, ())):
            if isinstance(value := values.get(each), int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise UsageError(f'model.name = "{name}": config.json has no number {key}; {_REMEDY}')
        return default

    layers, hidden, heads = field("num_hidden_layers"), field("hidden_size"), field("num_attention_heads")
    kv_heads = 1 if values.get("multi_query") else field("num_key_value_heads", heads)
    head_dim = field("head_dim", hidden // heads)
    if "kv_lora_rank" in values:
        raise UsageError(f'model.name = "{name}": plan does not know latent attention (kv_lora_rank); {_REMEDY}')
    feed_forward = field("intermediate_size", 4 * hidden)
    matrices = 2 if kind in _TWO_MATRICES else 3
    experts = field("num_experts", 0) if "num_experts_per_tok" in values else 0
    per_token = field("num_experts_per_tok") if experts else 0
    width = field("moe_intermediate_size", feed_forward) if experts else 0

    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    skipped = values.get("mlp_only_layers")
    dense_layers = len(skipped) if isinstance(skipped, list) else field("first_k_dense_replace", 0)
    sparse_layers = layers - dense_layers if experts else 0
    shared = field("shared_expert_intermediate_size", 0) or width * field("n_shared_experts", 0)
    one_expert = 3 * hidden * width
    feed = (layers - sparse_layers) * matrices * hidden * feed_forward + sparse_layers * hidden * (
        3 * shared + experts
    )  # the router has one row per expert
    expert_parameters = sparse_layers * experts * one_expert
    table = field("vocab_size") * hidden
    tied = bool(config.get("tie_word_embeddings", values.get("tie_word_embeddings", _tied_by_default(kind))))
    positions = 0
    if kind in _LEARNED_POSITIONS:
        positions = hidden * (field("max_position_embeddings") + _LEARNED_POSITIONS[kind])
    blocks = layers * attention + feed
    return ModelShape(
        name=name,
        parameters=float(blocks + expert_parameters + table * (1 if tied else 2) + positions),
        active=float(blocks + sparse_layers * per_token * one_expert + table),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=feed_forward,
        experts=experts,
        experts_per_token=per_token,
        expert_parameters=float(expert_parameters),
    )


def _tied_by_default(kind: str) -> bool:
    """What transformers assumes if config.json has no tie_word_embeddings."""
    return kind in {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neo", "opt"}


def _read_config(name: str) -> dict[str, Any]:
    """The fields of a model's config.json."""
    path = user_path(name)
    if name.lower().endswith(".gguf") or ("/" not in name and not is_dir(path)):
        raise UsageError(f'model.name = "{name}": is no hub name and no folder with a config.json; {_REMEDY}')
    file = path / "config.json" if is_dir(path) else _from_hub(name)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f'model.name = "{name}": config.json cannot be read ({error_line(error)}); {_REMEDY}'
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f'model.name = "{name}": config.json holds no table; {_REMEDY}')
    return config


def _from_hub(name: str) -> Path:
    """The config.json of a model on the hub: from the cache, or downloaded."""
    repository, revision = split_revision(name)
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if not hub_reachable():
            raise UsageError(f'model.name = "{name}": {unreachable()}, or {_REMEDY}')
        with hidden_bars():
            return Path(hf_hub_download(repository, "config.json", revision=revision))
    except HFValidationError as error:
        raise UsageError(f'model.name = "{name}": is no hub name and no folder; {_REMEDY}') from error
    except UsageError:
        raise
    except Exception as error:
        if (problem := hub_problem(error)) is None:
            raise
        raise UsageError(f'model.name = "{name}": {problem}; or {_REMEDY}') from error

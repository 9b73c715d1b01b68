"""The tiny model as examples and documentation need it: room for their prompts, and answers in its chat template."""

from __future__ import annotations

from pathlib import Path

from gruppo.models.weights import save_model
from tests.conftest import make_policy

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}={{ m['content'] }}{{ eos_token }}"
    "{% else %}<{{ m['content'] }}>{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def save_tiny(folder: Path) -> str:
    """Write the model and its tokenizer. Returns the folder as text."""
    policy = make_policy(initializer_range=0.02, max_position_embeddings=4096)
    policy.tokenizer.chat_template = TEMPLATE
    save_model(policy, folder)
    return str(folder)

"""Training on several ranks: processes of torch.distributed, each with a shard of every model."""

import gruppo.actors  # noqa: F401  Ray's settings

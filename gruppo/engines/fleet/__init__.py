"""Many engines behind one: actors of Ray, each with a native engine or vLLM."""

import gruppo.actors  # noqa: F401  Ray's settings

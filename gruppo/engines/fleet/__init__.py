"""Many engines behind one: actors of Ray, each with a native engine or vLLM."""

from gruppo.utils.ray_settings import set_ray_defaults

set_ray_defaults()

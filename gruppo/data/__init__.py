"""From rows of any source to `Prompt`s with token ids: sources, benchmarks, mixtures, offline completions."""

"""The recipe: its sections, validation, loading, method presets and JSON schema."""

"""The run folder: layout, atomic writes, safe reads, tables, recorder, warnings, results."""

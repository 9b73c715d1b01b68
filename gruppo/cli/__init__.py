"""The command line: argument parsing and console output only."""

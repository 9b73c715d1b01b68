"""`python -m gruppo.cli`."""

from gruppo.cli.main import main

main()

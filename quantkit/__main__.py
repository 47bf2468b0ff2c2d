"""`python -m quantkit` is the `quantkit` command."""

from quantkit.cli import main

main()

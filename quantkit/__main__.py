"""`python -m quantkit` is the `quantkit` command."""

from quantkit.cli.main import main

main()

"""The `quantkit` command, `python -m quantkit` too: Ctrl-C is one line from the first moment on."""

import sys


def main() -> None:
    """The console script."""
    try:
        from quantkit.cli.main import main as command

        command()
    except KeyboardInterrupt:  # while the command itself is being imported; later on the verbs answer
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

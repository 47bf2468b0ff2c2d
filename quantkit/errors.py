"""The two failures a user sees. No torch here: recipes are checked without loading it."""


class UserError(ValueError):
    """Bad input: the message says what, where and what to do. The command line prints it alone and exits with 2."""


class RunError(RuntimeError):
    """A run that failed through no fault of its input (disk full, matrix that will not factor). Exit code 1."""


class DiskFullError(UserError, RunError):
    """No room for the result: usually known before any work, and for the user to fix. Exit code 2."""

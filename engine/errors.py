"""Errors that are the user's to mend: one line that names the argument, what was expected and what came."""


class UserError(ValueError):
    """Bad configuration, data or argument. The command line prints its message alone and exits with code 2."""

"""Errors that are the user's to mend."""


class InputError(Exception):
    """Wrong configuration or input that makes a run meaningless.

    The message names the file (and row), says what was found and what to do. The command line
    prints it without a traceback and exits with code 2.
    """

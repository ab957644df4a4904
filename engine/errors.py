"""The two ways a command ends badly, each with its own exit code."""


class InputError(Exception):
    """The user's input is wrong: exit code 2.

    The message is one line that says what is wrong, where (file, row, column or key) and what
    to do about it. It is shown without a traceback.
    """


class RunError(Exception):
    """The input was right but the run failed: exit code 1."""

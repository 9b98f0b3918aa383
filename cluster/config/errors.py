"""What a user did wrong: shown as one line, exit status 2, no stack trace."""


class UserError(Exception):
    """Bad input; the message names what and where, the value, and what was expected."""


class DataLost(RuntimeError):
    """Data of a step were on a node that is gone: whoever needs them has to have them made again."""

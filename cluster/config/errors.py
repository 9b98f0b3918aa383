"""The errors that end a command with one line and without a stack trace."""


class UserError(Exception):
    """Bad input, exit status 2; the message names what and where, the value, and what was expected."""


class RunFailed(RuntimeError):
    """The base of every error that ends a run as a failure, exit status 1; the message says why."""


class PoolError(RunFailed):
    """A call failed on every attempt; the message holds the last cause."""


class LearnerError(RunFailed):
    """The learner failed by itself, and would again: out of memory, a full disk."""


class LearnerLost(RunFailed):
    """A rank died or hangs. Ranks live and die together: all start anew, from the last checkpoint."""


class GaveUp(RunFailed):
    """The learner was lost again and again after the same checkpoint."""


class WeightsError(RunFailed):
    """Weights did not arrive as they were sent, twice."""


class RunStopped(RunFailed):
    """The run cannot go on usefully; the message says why."""


class CheckpointError(RunFailed):
    """A checkpoint could not be written, most likely since the disk is full; the older ones are untouched."""


class FolderError(RunFailed):
    """The run folder could not be written, most likely since the disk is full."""


class DataLost(RuntimeError):
    """Data of a step were on a node that is gone: whoever needs them has to have them made again."""

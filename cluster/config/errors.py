"""The errors that end a command with one line and without a stack trace."""


class UserError(Exception):
    """Bad input, exit status 2; the message names the key or file, the value, and what was expected."""


class RunFailed(RuntimeError):
    """The base of every error that ends a run as a failure, exit status 1; the message gives the reason."""


class PoolError(RunFailed):
    """A call failed on every attempt; the message names the last cause."""


class LearnerError(RunFailed):
    """The learner failed for a reason that would recur: out of memory, a full disk."""


class LearnerLost(RunFailed):
    """A rank died or hangs; all ranks must restart from the last checkpoint."""


class GaveUp(RunFailed):
    """The learner was lost repeatedly after the same checkpoint."""


class WeightsError(RunFailed):
    """A sampler received damaged weights twice in a row."""


class RunStopped(RunFailed):
    """The run cannot continue usefully; the message gives the reason."""


class CheckpointError(RunFailed):
    """A checkpoint could not be written, most likely because the disk is full; older ones are intact."""


class FolderError(RunFailed):
    """The run folder could not be written, most likely because the disk is full."""


class DataLost(RuntimeError):
    """Data of a step were lost with their node and must be computed again."""

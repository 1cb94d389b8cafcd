"""The ways in which a command ends early. The door turns each into one line and an exit code."""


class UserError(ValueError):
    """Input that cannot be used: the message names the value, the reason and what would be accepted (exit code 2)."""


class RunError(RuntimeError):
    """A run that cannot go on though its input was good: a full disk, a loss that is not finite (exit code 1)."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM asked a run to stop, and it saved a checkpoint first: a clean end (exit code 0)."""

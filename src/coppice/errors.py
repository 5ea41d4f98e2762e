"""What goes wrong in a way the user can mend: one sentence saying what, where, and what to do."""


class CoppiceError(Exception):
    """Bad input or an impossible request; the command line prints it as one line and exits with status 2."""


class UnreachableError(CoppiceError):
    """No cut is small enough for the target."""


class DivergedError(CoppiceError):
    """A training whose loss is not finite any more."""


class VerificationError(CoppiceError):
    """The pruned model does not compute what the plan promises; names the axis, the op and the module."""

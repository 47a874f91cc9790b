"""The error of the service stack."""

from rdd_storage.errors import RddError


class StackError(RddError, RuntimeError):
    """A service did not start, or something that it needs is missing."""

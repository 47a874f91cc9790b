"""Errors of the pipeline; see :mod:`rdd_storage.errors` for the base and the habits."""

from rdd_storage.errors import RddError


class ConfigError(RddError, ValueError):
    """The configuration has an unknown key, a wrong type or values that contradict each other."""


class DataError(RddError, ValueError):
    """The data set is incomplete or inconsistent; the message lists every problem found."""


class ImageReadError(RddError, OSError):
    """One image or label file cannot be read."""


class NetworkError(RddError, ValueError):
    """A network cannot be built as described, or does not give what is asked of it."""


class CheckpointError(RddError, ValueError):
    """Weights do not fit the network, or a checkpoint is damaged or refused."""


class NonFiniteError(RddError, ArithmeticError):
    """The teacher or the loss gave NaN or infinity."""


class ClusterError(RddError, RuntimeError):
    """The Dask workers cannot do what is asked of them, or differ from this machine."""


class ClusterUnavailableError(ClusterError, ConnectionError):
    """The Dask scheduler does not answer, was lost, or has no workers left."""

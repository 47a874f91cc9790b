"""Make torchvision importable beside a torch build that its compiled part does not fit.

PyPI's torchvision wheel is compiled for the CUDA build of torch. Beside a CPU build its shared
library cannot be loaded, the operators in it stay undeclared, and torchvision's import fails
with ``operator torchvision::nms does not exist``, and with it every import of timm,
segmentation-models-pytorch or torchmetrics. Only two operators are needed at import time;
declaring them, without an implementation, is enough. Calling one of them still fails with
torchvision's own explanation; this project calls neither.

Import this module before the first import of torchvision or of a package that imports it::

    import rdd_pipeline.networks.torchvision_ops  # noqa: F401  before torchmetrics

It changes nothing where the compiled library loads, where torchvision is absent, and where it
has been imported already.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import warnings

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A declaration lives as long as its library object.
_library: torch.library.Library | None = None


def compiled_library_loads() -> bool:
    """Whether torchvision's compiled library fits this torch; loads it if so."""
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package is not None else None
    extension = importlib.machinery.PathFinder.find_spec("_C", folders) if folders else None
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)  # type: ignore[no-untyped-call]
    except (ImportError, OSError):
        return False
    return True


def declare_missing_operators() -> None:
    """Declare the operators that torchvision's import needs, where nothing else does.

    Idempotent. Raises nothing: where torchvision is not installed, importing it will say so.
    """
    global _library
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    if compiled_library_loads():
        return
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            _library.define(_SCHEMAS[name])  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # The image codecs are part of the same compiled library and unused here.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        import torchvision  # noqa: F401


declare_missing_operators()

"""Weights on disk, and the hash that identifies them.

Weights are written as safetensors. Checkpoints of torch are read without running code from
them.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import pickle
import uuid
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.networks.base import SegmentationNetwork, first_line

_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 10


def save_weights(network: torch.nn.Module, path: Path) -> None:
    """Write the state dict as safetensors: whole, or not at all.

    Args:
        network: Its tensors may be on any device; they are written contiguously.
        path: Written beside it under a temporary name, then renamed over it.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    # Cloned, as safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {len(content)} bytes of weights cannot be written "
            f"({error.strerror or error}); check free space and permissions"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint to the CPU.

    The content decides the format: safetensors, or a checkpoint of torch (not under the name
    ``.safetensors``), read with ``weights_only=True``. A dictionary under ``state_dict``,
    ``model`` and the like is taken out, and the prefixes of data-parallel and compiled modules
    are removed.

    Raises:
        CheckpointError: The file is missing, damaged, would run code, or holds no weights.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); give a file of weights"
        ) from error
    if start[8:9] == b"{":
        return _strip_prefixes(_load_safetensors(path))
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return _strip_prefixes(_unwrap(_load_torch(path), path))
    raise CheckpointError(
        f"{path}: damaged, or neither safetensors nor a checkpoint of torch; "
        "save the state dict again"
    )


def load_weights(network: SegmentationNetwork, path: Path) -> None:
    """Load weights into a network; every tensor must be there and fit.

    Raises:
        CheckpointError: The file cannot be used (:func:`load_state`), is of another number of
            classes, or its names and shapes differ from the network's; then the network keeps
            its weights.
    """
    path = Path(path)
    state = load_state(path)
    expected = network.state_dict()
    _check_classes(network, expected, state, path)
    _check_names(network, expected, state, path)
    network.load_state_dict(state)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) over names, dtypes, shapes and values, sorted by name.

    Independent of device, memory layout, file format and order.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        header = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0"
        digest.update(header.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(network: torch.nn.Module) -> str:
    """:func:`state_hash` of everything in the network's state dict, running statistics too."""
    return state_hash(network.state_dict())


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated safetensors ({error}); copy or save it again"
        ) from error


def _load_torch(path: Path) -> Any:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: named .safetensors, but it is a checkpoint of torch or damaged; "
            "rename it to .pth, or save it again"
        )
    try:
        with warnings.catch_warnings():
            # Whether the protocol matters shows in the result.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, as it holds more than tensors and reading it could run code "
            "(or it is damaged); where you trust its source, load it yourself and save the "
            "state dict as safetensors"
        ) from error
    # torch raises many types for damaged files, among them RuntimeError, EOFError and KeyError.
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged, truncated or no checkpoint of weights ({first_line(error)}); "
            "copy or save it again"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside what torch read."""
    inner = content
    if isinstance(content, Mapping):
        for key in _WRAPPER_KEYS:
            if isinstance(content.get(key), Mapping):
                inner = content[key]
                break
    if not isinstance(inner, Mapping) or not inner:
        raise CheckpointError(
            f"{path}: expected a state dict, got {type(inner).__name__}; save network.state_dict()"
        )
    others = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: expected tensors by name, possibly under one of {', '.join(_WRAPPER_KEYS)}; "
            f"these are no tensors: {_listing(others)}"
        )
    return {str(name): tensor for name, tensor in inner.items()}


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stripped = True
    while stripped and state:
        stripped = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                stripped = True
    return state


def _check_classes(
    network: SegmentationNetwork,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    path: Path,
) -> None:
    for name in network.classifier_names:
        if name not in state or name not in expected:
            continue
        found, wanted = state[name].shape, expected[name].shape
        if len(found) == len(wanted) and found[0] != wanted[0] and found[1:] == wanted[1:]:
            raise CheckpointError(
                f"{path}: checkpoint has {found[0]} classes, data set has "
                f"{network.num_classes} ('{name}'); use a checkpoint trained on these classes"
            )


def _check_names(
    network: SegmentationNetwork,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    path: Path,
) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} (checkpoint {list(state[name].shape)}, network {list(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"{path}: the checkpoint does not fit the network"]
    if missing:
        lines.append(f"  {len(missing)} missing: {_listing(_with_nearest(missing, unexpected))}")
    if unexpected:
        lines.append(f"  {len(unexpected)} unexpected: {_listing(unexpected)}")
    if shapes:
        lines.append(f"  {len(shapes)} of another shape: {_listing(shapes)}")
    if missing and all(name.startswith("auxiliary_head.") for name in missing):
        lines.append(
            "  It has no auxiliary head: train one, or leave out the network's 'auxiliary'"
        )
    elif unexpected and all(name.startswith("auxiliary_head.") for name in unexpected):
        lines.append("  It has an auxiliary head: add 'auxiliary: {}' to the network")
    else:
        lines.append("  Check the network's architecture, encoder and options")
    raise CheckpointError("\n".join(lines))


def _with_nearest(missing: list[str], unexpected: list[str]) -> list[str]:
    """The missing names, those that are shown with the nearest name in the checkpoint."""
    described = list(missing)
    for i, name in enumerate(missing[:_LISTED]):
        near = difflib.get_close_matches(name, unexpected, n=1, cutoff=0.6)
        if near:
            described[i] = f"{name} (nearest in the checkpoint: {near[0]})"
    return described


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Weights on disk, and the hash that identifies them.

Weights are written as safetensors. Checkpoints of torch are read without running code from
them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import pickle
import uuid
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.networks.base import SegmentationNetwork, first_line
from rdd_pipeline.networks.layouts import rename

_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 10
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# How the names of auxiliary heads begin in the networks that may or may not have one.
_AUXILIARY = ("auxiliary_head.", "aux_classifier.")


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


def checkpoint_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: itself, or those of a folder.

    A folder holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards that
    it names.

    Raises:
        CheckpointError: The folder holds neither, the index is damaged, or a shard is missing.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    if (path / _SINGLE_FILE).is_file():
        return [path / _SINGLE_FILE]
    index = path / _INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{path}: cannot be read (Is a directory without {_SINGLE_FILE} or {_INDEX_FILE}); "
            "give a file of weights, or a folder with one of these"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: expected JSON with a weight_map from tensors to files "
            f"({type(error).__name__}); copy or save it again"
        ) from error
    missing = [
        shard for shard in shards if Path(shard).name != shard or not (path / shard).exists()
    ]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(missing)} of {len(shards)} files that are not in its folder: "
            f"{_listing(missing)}; copy them too"
        )
    return [path / shard for shard in shards]


def load_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint to the CPU.

    The content decides the format: safetensors, or a checkpoint of torch (not under the name
    ``.safetensors``), read with ``weights_only=True``. A dictionary under ``state_dict``,
    ``model`` and the like is taken out, and the prefixes of data-parallel and compiled modules
    are removed. Of a folder the files of :func:`checkpoint_files` are read.

    Raises:
        CheckpointError: A file is missing, damaged, would run code, or holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        return {name: t for file in checkpoint_files(path) for name, t in load_state(file).items()}
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


def load_weights(
    network: SegmentationNetwork,
    path: Path,
    *,
    layout: str = "native",
    strict: bool = True,
    may_lack: Collection[str] = (),
) -> list[str]:
    """Load weights into a network; every tensor must be there and fit, unless told otherwise.

    Args:
        network: Keeps its weights where this fails.
        path: A file (:func:`load_state`), or a folder of :func:`checkpoint_files`.
        layout: ``native``, the network's own names with or without what stands before them in
            its state dict; or a code base of :mod:`rdd_pipeline.networks.layouts`.
        strict: False loads the tensors that fit in name and shape, at least one.
        may_lack: Names that need not be there, such as those of a head that is to be trained.

    Returns:
        Lines that say what was not loaded; none where everything was.

    Raises:
        CheckpointError: The file cannot be used, is of another number of classes (unless not
            ``strict``), or its names and shapes differ from the network's.
    """
    path = Path(path)
    read_folder = getattr(network, "read_folder", None)
    state = read_folder(path) if read_folder is not None and path.is_dir() else load_state(path)
    expected = network.state_dict()
    if layout != "native":
        state = rename(state, layout, path)
    elif state.keys().isdisjoint(expected):
        prefixed = {network.name_prefix + name: tensor for name, tensor in state.items()}
        state = state if prefixed.keys().isdisjoint(expected) else prefixed
    if strict:
        _check_classes(network, expected, state, path)
    wanted = {n: tensor for n, tensor in expected.items() if n in state or n not in may_lack}
    differences = state_differences(wanted, state)
    if differences and strict:
        lines = [f"{path}: the checkpoint does not fit the network", *differences]
        advice = (
            f"Give its folder, {path.parent}, which the network's library reads by itself"
            if read_folder is not None and (path.parent / "config.json").exists()
            else _advice(expected, state)
        )
        raise CheckpointError("\n".join([*lines, f"  {advice}"]))
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if name in expected and tensor.shape == expected[name].shape
    }
    if not fitting:
        raise CheckpointError("\n".join([f"{path}: not one tensor fits the network", *differences]))
    network.load_state_dict(fitting, strict=False)
    return differences


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
                # Networks of masks have one class more, for no object.
                f"{path}: checkpoint has {found[0] - wanted[0] + network.num_classes} classes, "
                f"data set has {network.num_classes} ('{name}'); use a checkpoint trained on "
                "these classes"
            )


def state_differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line for each way in which a checkpoint's names and shapes differ from a network's."""
    missing, unexpected = _missing(expected, state), _missing(state, expected)
    shapes = [
        f"{name} (checkpoint {list(state[name].shape)}, network {list(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    lines = []
    if missing:
        lines.append(f"  {len(missing)} missing: {_listing(_with_nearest(missing, unexpected))}")
    if unexpected:
        lines.append(f"  {len(unexpected)} unexpected: {_listing(unexpected)}")
    if shapes:
        lines.append(f"  {len(shapes)} of another shape: {_listing(shapes)}")
    return lines


def _advice(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    missing, unexpected = _missing(expected, state), _missing(state, expected)
    if missing and all(name.startswith(_AUXILIARY) for name in missing):
        return "It has no auxiliary head: train one, or leave out the network's 'auxiliary'"
    if not missing and unexpected and all(name.startswith(_AUXILIARY) for name in unexpected):
        return "It has an auxiliary head: add 'auxiliary: true' to the network"
    return "Check the network's architecture, encoder and options"


def _missing(wanted: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> list[str]:
    return [name for name in wanted if name not in there]


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

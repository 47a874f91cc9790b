"""Reading a configuration, and saying what is wrong with it."""

from __future__ import annotations

import difflib
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from rdd_pipeline.config.run import RunConfig
from rdd_pipeline.errors import ConfigError


def load_config(path: Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.path=value`` overrides (values are YAML) and check it.

    Raises:
        ConfigError: The file is missing or no YAML, or keys or values are wrong; all are listed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str = "configuration") -> RunConfig:
    """Check a configuration that was read from YAML or JSON.

    Raises:
        ConfigError: Keys or values are wrong; all of them are listed.
    """
    try:
        return RunConfig.model_validate(_expand_paths(tree))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError("\n".join([f"{source}: {len(lines)} problem(s)", *lines])) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, override, ".".join(parents[:depth]), create=True)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} holds a value, not keys")


def _child(node: Any, part: str, override: str, path: str, *, create: bool) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {path} holds a value, not keys")
    if create and node.get(part) is None:
        node[part] = {}
    return node[part]


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"--set {override}: expected an index from 0 to {len(node) - 1}, got {part!r}"
        )
    return int(part)


def _expand_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Expand ``~`` and ``$VARIABLES`` in strings, so that configurations can be shared."""

    def expand(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expand(item) for key, item in value.items()}
        if isinstance(value, list):
            return [expand(item) for item in value]
        if isinstance(value, str) and value.startswith("~"):
            value = str(Path(value).expanduser())
        return os.path.expandvars(value) if isinstance(value, str) else value

    return {str(key): expand(item) for key, item in tree.items()}


def _explain(item: Any) -> str:
    keys, _ = _locate(item["loc"])
    path = ".".join(str(part) for part in keys)
    if item["type"] == "extra_forbidden":
        _, models = _locate(item["loc"][:-1])
        valid = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(str(keys[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
        return f"  {path}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        message = "required, but missing"
    elif not message.startswith(("give ", "expected ")) and not isinstance(item["input"], dict):
        message = f"{message}, got {item['input']!r}"
    return f"  {path}: {message}" if path else f"  {message}"


def _locate(
    location: tuple[int | str, ...],
) -> tuple[list[int | str], list[type[BaseModel]]]:
    """Keys of the file that a location of a validation error stands for, and the models there.

    A union's ``type`` stands in the location of an error but is no key of the file.
    """
    keys: list[int | str] = []
    models: list[type[BaseModel]] = [RunConfig]
    named = False
    for part in location:
        if part == "[key]":  # what is wrong is the name before it
            continue
        if named:  # a name that the user chose, such as that of a grid's network
            named = False
            keys.append(part)
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        named = any(typing.get_origin(field.annotation) is dict for field in fields)
        tagged = [
            model
            for model in models
            if "type" in model.model_fields and model.model_fields["type"].default == part
        ]
        if tagged and not fields:
            models = tagged
            continue
        keys.append(part)
        models = [m for field in fields for m in _models_in(field.annotation)] or models
    return keys, models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    containers = (typing.Union, types.UnionType, tuple, list, dict, Annotated)
    if typing.get_origin(annotation) in containers:
        return [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return []

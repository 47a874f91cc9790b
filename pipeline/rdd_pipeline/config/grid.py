"""Many students at once: networks x methods x seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from rdd_pipeline.config._base import Model
from rdd_pipeline.config.networks import NetworkConfig
from rdd_pipeline.config.students import MethodConfig, StudentConfig, StudentName

DEFAULT_BASELINE = "supervised"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridStudent:
    """One student of a grid, and its place there."""

    network: str | None
    """Name of its network in ``grid.networks``; None for the shared one."""
    method: str
    """Name of its method in ``grid.methods``."""
    student: StudentConfig


class GridConfig(Model):
    """Every method with every network and every seed."""

    networks: dict[StudentName, NetworkConfig] = Field(default_factory=dict)
    """Networks by name; none takes ``student.network``."""
    methods: tuple[MethodConfig, ...]
    """A method's name, several joined by ``+``, or a section as in ``students`` without network
    and seed."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...]
    """Intervals of a comparison take at least two, and are wide with fewer than five."""
    baseline: str | None = None
    """Name of the method that the others are compared with; None takes ``supervised`` if it is
    among them."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"expected at least one seed and none twice, got {list(value)}")
        return value

    @field_validator("methods")
    @classmethod
    def _names_differ(cls, value: tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
        if not value:
            raise ValueError("expected at least one method")
        names = [method.name for method in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected a name of its own for each method, got {twice} twice")
        for number, method in enumerate(value):
            for other in value[:number]:
                if method.model_copy(update={"name": other.name}) == other:
                    raise ValueError(
                        f"expected different methods, got '{other.name}' and '{method.name}' with "
                        "equal settings"
                    )
        return value

    @model_validator(mode="after")
    def _baseline_is_there(self) -> GridConfig:
        names = [method.name for method in self.methods]
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline: expected one of {names}, got '{self.baseline}'")
        return self

    def students(self) -> tuple[GridStudent, ...]:
        """The students: all methods of a network and seed before the next seed.

        Names are ``network-method-s0``, without the network where there is one.
        """
        networks: list[tuple[str | None, NetworkConfig | None]] = [*self.networks.items()]
        found = []
        for name, network in networks or [(None, None)]:
            prefix = f"{name}-" if len(self.networks) > 1 else ""
            for seed in self.seeds:
                for method in self.methods:
                    fields = {key: getattr(method, key) for key in type(method).model_fields}
                    fields |= {"name": f"{prefix}{method.name}-s{seed}"}
                    student = StudentConfig(**fields, network=network, seed=seed)
                    found.append(GridStudent(network=name, method=method.name, student=student))
        return tuple(found)

"""The whole configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rdd_pipeline.config._base import Model
from rdd_pipeline.config.cluster import ClusterConfig
from rdd_pipeline.config.data import DataConfig
from rdd_pipeline.config.grid import GridConfig
from rdd_pipeline.config.networks import NetworkConfig
from rdd_pipeline.config.students import StudentConfig, StudentDefaults
from rdd_pipeline.config.teacher import MapsConfig, TeacherConfig
from rdd_pipeline.config.training import TrainingConfig


class RunConfig(Model):
    """The whole way: teacher, maps, students, report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: Path = Path("runs")
    """The run's folder is ``output/name``."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cluster: ClusterConfig = ClusterConfig()
    """Dask workers of the teacher pass and of students that are trained side by side."""
    data: DataConfig
    teacher: TeacherConfig
    maps: MapsConfig = MapsConfig()
    student: StudentDefaults
    grid: GridConfig | None = None
    """Further students; they are added to ``students``."""
    students: tuple[StudentConfig, ...] = ()

    @field_validator("students")
    @classmethod
    def _grid_is_added(
        cls, value: tuple[StudentConfig, ...], info: ValidationInfo
    ) -> tuple[StudentConfig, ...]:
        grid: GridConfig | None = info.data.get("grid")
        listed = {student.name: student for student in value}
        added = []
        for item in () if grid is None else grid.students():
            # A configuration that was written out again lists the grid's students already.
            same = listed.get(item.student.name)
            if same is None:
                added.append(item.student)
            elif same != item.student:
                raise ValueError(
                    f"expected other names than the grid's students have, got '{same.name}' with "
                    "other settings; rename the student, or the method in the grid"
                )
        return value + tuple(added)

    @model_validator(mode="after")
    def _students_are_consistent(self) -> RunConfig:
        names = [student.name for student in self.students]
        if not names:
            raise ValueError("students: expected at least one, listed or by grid")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"students: the names {twice} are used twice")
        for student in self.students:
            stored = student.teacher == "stored"
            if stored and student.distils_logits and not self.maps.soft_labels:
                raise ValueError(
                    f"students: '{student.name}' distils logits, which needs maps.soft_labels: "
                    "true (a store without logits then gets them, and its other maps stay as they "
                    "are); kd.weight: 0 leaves out that of kd and rdd"
                )
        if self.device == "cpu" and self.cluster.gpus:
            raise ValueError("cluster.gpus: expected 0 with device: cpu; use device: auto or cuda")
        if self.maps.discrepancy == "heads" and not self.teacher.network.auxiliary:
            raise ValueError(
                "teacher.network.auxiliary: maps.discrepancy: heads compares a main and an "
                "auxiliary head, but this teacher has one head; add 'auxiliary: true' to its "
                "network if it is to be trained with one, or choose maps.discrepancy: flip, "
                "scales, entropy, margin or module:NAME"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run writes."""
        return self.output / self.name

    @property
    def maps_root(self) -> str:
        """Folder or URL of the map stores."""
        return self.maps.root if self.maps.root is not None else str(self.run_dir / "maps")

    def student_network(self, student: StudentConfig) -> NetworkConfig:
        """The student's network, its own or the shared one."""
        return student.network or self.student.network

    def student_training(self, student: StudentConfig) -> TrainingConfig:
        """The student's training settings, its own or the shared ones."""
        return student.training or self.student.training

    def student_seed(self, student: StudentConfig) -> int:
        """The student's seed, its own or the run's."""
        return self.seed if student.seed is None else student.seed

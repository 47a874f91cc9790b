"""What a report of a run is made from: its results, or what its students left without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rdd_pipeline.comparison import COMPARISON_FILE
from rdd_pipeline.errors import CheckpointError
from rdd_pipeline.files import read_json


def read_results(file: Path) -> dict[str, Any]:
    """The content of ``results.json``, or as much of that as ``students.json`` can say.

    Where ``rdd maps build`` and ``rdd students`` did the work, no stages were timed, the teacher is
    that of the folder if it was trained there, and the store may lie anywhere or be none.

    Raises:
        CheckpointError: The file is no JSON, or from before ``students.json`` said enough.
    """
    content: dict[str, Any] = read_json(file)
    if file.name != COMPARISON_FILE:
        return content
    from rdd_pipeline.results import student_row
    from rdd_pipeline.reuse import RESULT_FILE  # seconds to import

    if "config" not in content:
        raise CheckpointError(
            f"{file}: was written by an earlier version of rdd-maps and lacks what the report "
            "needs; run the same 'rdd students' again, which reuses what is finished"
        )
    folder = file.parent
    students = [
        student_row(student["name"], read_json(result), student["reused"])
        for student in content["students"]
        if (result := folder / "students" / student["name"] / RESULT_FILE).exists()
        and not student["error"]
    ]
    stores = [student["settings"]["store"] for student in students]
    teacher = folder / "teacher" / RESULT_FILE
    known = {key: content[key] for key in ("name", "finished", "machine", "config", "data")}
    return known | {
        "teacher": read_json(teacher) | {"in_this_run": False} if teacher.exists() else None,
        "maps": None
        if content["store"] is None
        else {
            "path": content["store"],
            "fingerprint": next(filter(None, stores), ""),
            "images_built": None,
        },
        "students": students,
        "seconds": {},
        "peak_memory_bytes": None,
    }

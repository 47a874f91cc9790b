"""Looking at difficulty maps without training: what they hold, where they are hard, any good?

    maps = Maps("runs/quickstart/maps/synthetic-train-….zarr", data="configs/quickstart.yaml")
    maps.hardest(10, by="soft_min")
    maps[maps.image_ids[0]].figure()
    maps.quality()

Nothing here trains. Only :meth:`Maps.student_history` loads a network.
"""

from rdd_pipeline.inspection.assessment import QualityReport, ScoreName, ScoreQuality
from rdd_pipeline.inspection.comparison import (
    ImageChange,
    StoreComparison,
    StudentHistory,
    StudentStep,
)
from rdd_pipeline.inspection.correlation import kendall_from_counts, spearman_from_counts
from rdd_pipeline.inspection.distributions import ClassDistributions, Confusion, Overview
from rdd_pipeline.inspection.errors import (
    CircularScoreError,
    DataNeededError,
    EmptySelectionError,
    InspectionError,
    UnknownClassError,
)
from rdd_pipeline.inspection.export import picture, write_csv, write_overlays
from rdd_pipeline.inspection.image import ImageView
from rdd_pipeline.inspection.images import DataSource
from rdd_pipeline.inspection.label_error_list import LabelError, LabelErrors
from rdd_pipeline.inspection.label_errors import find_label_errors
from rdd_pipeline.inspection.maps import Maps
from rdd_pipeline.inspection.measures import MEASURES, HardnessMeasures, hardness_measures
from rdd_pipeline.inspection.pixels import city_block_distance
from rdd_pipeline.inspection.quality import (
    ImageBootstrap,
    Interval,
    Scores,
    ece_from_counts,
    risk_coverage,
    scores_from_counts,
)
from rdd_pipeline.inspection.ranking import RankedImage, Ranking
from rdd_pipeline.inspection.summary import Summary
from rdd_pipeline.inspection.viewer import Viewer, viewer_fragment, viewer_page

__all__ = [
    "MEASURES",
    "CircularScoreError",
    "ClassDistributions",
    "Confusion",
    "DataNeededError",
    "DataSource",
    "EmptySelectionError",
    "HardnessMeasures",
    "ImageBootstrap",
    "ImageChange",
    "ImageView",
    "InspectionError",
    "Interval",
    "LabelError",
    "LabelErrors",
    "Maps",
    "Overview",
    "QualityReport",
    "RankedImage",
    "Ranking",
    "ScoreName",
    "ScoreQuality",
    "Scores",
    "StoreComparison",
    "StudentHistory",
    "StudentStep",
    "Summary",
    "UnknownClassError",
    "Viewer",
    "city_block_distance",
    "ece_from_counts",
    "find_label_errors",
    "hardness_measures",
    "kendall_from_counts",
    "picture",
    "risk_coverage",
    "scores_from_counts",
    "spearman_from_counts",
    "viewer_fragment",
    "viewer_page",
    "write_csv",
    "write_overlays",
]

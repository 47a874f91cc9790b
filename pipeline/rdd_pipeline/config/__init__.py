"""The configuration: one YAML file, checked before anything runs.

The same pydantic models are the parameters of the Prefect flows. Unknown keys, wrong types and
contradictions are all collected and reported together, each with the path of its key.
"""

from rdd_pipeline.config.cluster import ClusterConfig
from rdd_pipeline.config.data import (
    ADE20KData,
    CamVidData,
    CityscapesData,
    COCOStuffData,
    DataConfig,
    FolderData,
    FolderSplit,
    HuggingFaceData,
    SyntheticData,
    VOCData,
)
from rdd_pipeline.config.grid import DEFAULT_BASELINE, GridConfig, GridStudent
from rdd_pipeline.config.loading import load_config, parse_config
from rdd_pipeline.config.networks import (
    RGB,
    AuxiliaryHead,
    CustomConfig,
    NetworkConfig,
    SmpConfig,
    TorchvisionConfig,
    TransformersConfig,
    without_pretrained,
)
from rdd_pipeline.config.run import RunConfig
from rdd_pipeline.config.students import (
    FEATURE_METHODS,
    FeatureTap,
    KDConfig,
    Method,
    MethodConfig,
    RDDConfig,
    StudentConfig,
    StudentDefaults,
)
from rdd_pipeline.config.teacher import AveragingConfig, MapsConfig, TeacherConfig
from rdd_pipeline.config.training import EvaluationConfig, JitterConfig, TrainingConfig

__all__ = [
    "DEFAULT_BASELINE",
    "FEATURE_METHODS",
    "RGB",
    "ADE20KData",
    "AuxiliaryHead",
    "AveragingConfig",
    "COCOStuffData",
    "CamVidData",
    "CityscapesData",
    "ClusterConfig",
    "CustomConfig",
    "DataConfig",
    "EvaluationConfig",
    "FeatureTap",
    "FolderData",
    "FolderSplit",
    "GridConfig",
    "GridStudent",
    "HuggingFaceData",
    "JitterConfig",
    "KDConfig",
    "MapsConfig",
    "Method",
    "MethodConfig",
    "NetworkConfig",
    "RDDConfig",
    "RunConfig",
    "SmpConfig",
    "StudentConfig",
    "StudentDefaults",
    "SyntheticData",
    "TeacherConfig",
    "TorchvisionConfig",
    "TrainingConfig",
    "TransformersConfig",
    "VOCData",
    "load_config",
    "parse_config",
    "without_pretrained",
]

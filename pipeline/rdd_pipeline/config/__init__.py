"""The configuration: one YAML file, checked before anything runs.

The same pydantic models are the parameters of the Prefect flows. Unknown keys, wrong types and
contradictions are all collected and reported together, each with the path of its key.
"""

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
    RDDConfig,
    StudentConfig,
    StudentDefaults,
)
from rdd_pipeline.config.teacher import AveragingConfig, MapsConfig, TeacherConfig
from rdd_pipeline.config.training import TrainingConfig

__all__ = [
    "FEATURE_METHODS",
    "RGB",
    "ADE20KData",
    "AuxiliaryHead",
    "AveragingConfig",
    "COCOStuffData",
    "CamVidData",
    "CityscapesData",
    "CustomConfig",
    "DataConfig",
    "FeatureTap",
    "FolderData",
    "FolderSplit",
    "HuggingFaceData",
    "KDConfig",
    "MapsConfig",
    "Method",
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

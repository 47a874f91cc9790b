"""Map stores: the per-pixel difficulty of a data set for a teacher, in chunked Zarr.

Write with :class:`MapWriter`, one shard at a time; read with :class:`MapReader`. The codes of the
maps are made and decoded by the ``encode_*`` functions and the lookup tables. The format is
specified in docs/store-format.md.

Packs are stores of the same layout for the decoded images and labels of a data set:
:class:`PackWriter` and :class:`PackReader`.
"""

from rdd_storage.additions import MapAddition
from rdd_storage.catalogue import (
    DiskUsage,
    StoreUse,
    disk_usage,
    find_store,
    find_stores,
    record_use,
    uses,
)
from rdd_storage.errors import (
    ExtraNotInstalledError,
    ForkedProcessError,
    LeaseLostError,
    LocationError,
    RddError,
    ShardDataError,
    StoreAccessError,
    StoreDamagedError,
    StoreError,
    StoreFormatError,
    StoreIncompleteError,
    StoreLockedError,
    StoreMismatchError,
    StoreNotFoundError,
    StoreRemovalError,
    StoreUnavailableError,
    StoreWriteError,
    UnknownArrayError,
    UnknownImageError,
    UnknownVersionError,
    WindowError,
)
from rdd_storage.growth import Growth
from rdd_storage.identity import FORMAT_VERSION, fingerprint, identity_difference, store_path
from rdd_storage.lease import LeaseInfo, lease_holder
from rdd_storage.maps import ImageLogits, ImageMaps
from rdd_storage.packs import PackedImage
from rdd_storage.quantise import (
    CONFIDENCE_UNWRITTEN,
    HARDNESS_IGNORED,
    HARDNESS_UNWRITTEN,
    PREDICTION_UNWRITTEN,
    HardnessCodec,
    confidence_table,
    encode_confidence,
    encode_discrepancy,
    encode_hardness,
    encode_logits,
    hardness_codec,
    hardness_edges,
    hardness_table,
    true_prob_table,
)
from rdd_storage.reader import MapReader, PackReader, ShardMaps
from rdd_storage.remove import remove_store, remove_version
from rdd_storage.repair import RepairReport, repair_store
from rdd_storage.schema import ImageRecord, MapSchema, PackSchema
from rdd_storage.statistics import (
    MapStatistics,
    discrepancy_bin_edges,
    label_boundary,
    merge_statistics,
)
from rdd_storage.status import GrowthStatus, ListedStore, StoreStatus, list_stores, store_status
from rdd_storage.summary import ImageMeasures, Summary
from rdd_storage.summary_store import StoredSummary
from rdd_storage.verify import Damage, VerifyReport, verify_store
from rdd_storage.writer import MapWriter, PackWriter

__all__ = [
    "CONFIDENCE_UNWRITTEN",
    "FORMAT_VERSION",
    "HARDNESS_IGNORED",
    "HARDNESS_UNWRITTEN",
    "PREDICTION_UNWRITTEN",
    "Damage",
    "DiskUsage",
    "ExtraNotInstalledError",
    "ForkedProcessError",
    "Growth",
    "GrowthStatus",
    "HardnessCodec",
    "ImageLogits",
    "ImageMaps",
    "ImageMeasures",
    "ImageRecord",
    "LeaseInfo",
    "LeaseLostError",
    "ListedStore",
    "LocationError",
    "MapAddition",
    "MapReader",
    "MapSchema",
    "MapStatistics",
    "MapWriter",
    "PackReader",
    "PackSchema",
    "PackWriter",
    "PackedImage",
    "RddError",
    "RepairReport",
    "ShardDataError",
    "ShardMaps",
    "StoreAccessError",
    "StoreDamagedError",
    "StoreError",
    "StoreFormatError",
    "StoreIncompleteError",
    "StoreLockedError",
    "StoreMismatchError",
    "StoreNotFoundError",
    "StoreRemovalError",
    "StoreStatus",
    "StoreUnavailableError",
    "StoreUse",
    "StoreWriteError",
    "StoredSummary",
    "Summary",
    "UnknownArrayError",
    "UnknownImageError",
    "UnknownVersionError",
    "VerifyReport",
    "WindowError",
    "confidence_table",
    "discrepancy_bin_edges",
    "disk_usage",
    "encode_confidence",
    "encode_discrepancy",
    "encode_hardness",
    "encode_logits",
    "find_store",
    "find_stores",
    "fingerprint",
    "hardness_codec",
    "hardness_edges",
    "hardness_table",
    "identity_difference",
    "label_boundary",
    "lease_holder",
    "list_stores",
    "merge_statistics",
    "record_use",
    "remove_store",
    "remove_version",
    "repair_store",
    "store_path",
    "store_status",
    "true_prob_table",
    "uses",
    "verify_store",
]

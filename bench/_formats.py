"""Ways to keep two maps per image: hardness (H, W) and discrepancy (h, w).

Each knows how to write a number of images and to read a window of one. The float formats keep the
probability itself; the others the 8-bit codes and float16 of the map store.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt
import zarr
from PIL import Image

from _maps import Setting, TeacherMaps
from rdd_storage import MapReader, MapWriter
from rdd_storage.layout import encode_objects, map_specs
from rdd_storage.location import locate

Window = tuple[slice, slice]
Crop = tuple[npt.NDArray[Any], npt.NDArray[Any]]

KEPT_IN_RAM = 64 << 20  # bytes of discrepancies


class Format(ABC):
    """One way to keep the maps."""

    name: str
    note: str = ""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        self.folder = folder
        self.images = setting.images

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be measured here; empty when it can."""
        return ""

    @classmethod
    def load(cls) -> None:
        """Import what is imported late, so that it counts neither as time nor as memory."""
        importlib.import_module("rdd_storage")

    @abstractmethod
    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Write all images; the folder exists and is empty."""

    @abstractmethod
    def open(self) -> None:
        """Get ready to read; called once in a process."""

    @abstractmethod
    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Hardness and discrepancy of a crop, in arrays of their own."""


class MapStore(Format):
    """The map store, hardness and discrepancy of it."""

    name = "**map store**"
    note = "zstd 3, checksums; one object for each array and shard"
    in_ram = False

    @classmethod
    def load(cls) -> None:
        """Tensorstore."""
        importlib.import_module("tensorstore")

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """The two arrays alone; :func:`write_store` makes the store that is read."""
        location = locate(self.folder)
        batches = {
            "hardness": np.stack([item.maps.hardness for item in maps]),
            "discrepancy": np.stack([item.maps.discrepancy for item in maps]),
        }
        size = self.setting.shard_images
        specs = map_specs(self.setting.schema(), len(maps))
        for name, batch in batches.items():
            for shard in range(-(-len(maps) // size)):
                rows = batch[shard * size : (shard + 1) * size]
                for key, data in encode_objects(specs[name], rows, first=shard).items():
                    location.put(key, data)

    def open(self) -> None:
        """One request for the head and one for the manifest."""
        self._reader = MapReader(self.folder)
        if self.in_ram and not self._reader.preload("discrepancy", budget=KEPT_IN_RAM):
            raise RuntimeError("the discrepancies do not fit the budget")

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Both reads overlap."""
        name = f"{image:04d}"
        hardness, discrepancy = self._reader.read_many(
            [("hardness", name, pixels), ("discrepancy", name, points)]
        )
        return hardness, discrepancy


class MapStoreInRam(MapStore):
    """The map store with ``preload("discrepancy")``."""

    name = "map store, discrepancy in RAM"
    note = "all discrepancies are read when it is opened"
    in_ram = True


class MapStoreByZarr(MapStore):
    """The same store read by zarr-python."""

    name = "map store read by zarr-python"
    note = "the same files"

    def open(self) -> None:
        """Consolidated metadata, as xarray reads them."""
        group = zarr.open_group(self.folder, mode="r")
        self._arrays = group["hardness"], group["discrepancy"]

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Plain indexing."""
        hardness, discrepancy = self._arrays
        return np.asarray(hardness[(image, *pixels)]), np.asarray(discrepancy[(image, *points)])


class Npy(Format):
    """A file of float32 for each map."""

    name = "npy, float32"
    note = "np.load of the whole file"

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Two files an image."""
        for index, item in enumerate(maps):
            np.save(self.folder / f"{index}-p.npy", item.p_true)
            np.save(self.folder / f"{index}-d.npy", item.discrepancy)

    def open(self) -> None:
        """Nothing to open."""

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Whole files, then the window."""
        p = np.load(self.folder / f"{image}-p.npy")
        d = np.load(self.folder / f"{image}-d.npy")
        return p[pixels].copy(), d[points].copy()


class Npz(Npy):
    """A compressed file of float32 for each image."""

    name = "npz, float32"
    note = "np.savez_compressed (deflate)"

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """One file an image."""
        for index, item in enumerate(maps):
            np.savez_compressed(self.folder / f"{index}.npz", p=item.p_true, d=item.discrepancy)

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Whole arrays, then the window."""
        with np.load(self.folder / f"{image}.npz") as file:
            return file["p"][pixels].copy(), file["d"][points].copy()


class Png(Npy):
    """Grey images: 8 bit for hardness, 16 bit for the discrepancy's bits."""

    name = "PNG, 8 bit"
    note = "Pillow, default compression; discrepancy as 16-bit PNG"

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Two files an image."""
        for index, item in enumerate(maps):
            Image.fromarray(item.maps.hardness).save(self.folder / f"{index}-p.png")
            bits = np.ascontiguousarray(item.maps.discrepancy).view(np.uint16)
            Image.fromarray(bits).save(self.folder / f"{index}-d.png")

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Whole images, then the window."""
        with Image.open(self.folder / f"{image}-p.png") as file:
            hardness = np.asarray(file)[pixels].copy()
        with Image.open(self.folder / f"{image}-d.png") as file:
            bits = np.asarray(file)[points].astype(np.uint16)
        return hardness, bits.view(np.float16)


class Hdf5(Format):
    """One HDF5 file with an image to a chunk."""

    filters: ClassVar[dict[str, Any]]

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Two data sets."""
        with h5py.File(self.folder / "maps.h5", "w") as file:
            for name, first in (
                ("hardness", maps[0].maps.hardness),
                ("discrepancy", maps[0].maps.discrepancy),
            ):
                data = file.create_dataset(
                    name,
                    (len(maps), *first.shape),
                    first.dtype,
                    chunks=(1, *first.shape),
                    **self.filters,
                )
                for index, item in enumerate(maps):
                    data[index] = getattr(item.maps, name)

    def open(self) -> None:
        """The file stays open. No chunk cache: in training no image comes back soon."""
        file = h5py.File(self.folder / "maps.h5", "r", rdcc_nbytes=0)
        self._data = file["hardness"], file["discrepancy"]

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Windows of the data sets."""
        hardness, discrepancy = self._data
        return hardness[(image, *pixels)], discrepancy[(image, *points)]


class Hdf5Lz4(Hdf5):
    """HDF5 with lz4."""

    name = "HDF5, lz4"
    note = "hdf5plugin; an image to a chunk; no checksums"
    filters = dict(hdf5plugin.LZ4())  # noqa: RUF012


class Hdf5Gzip(Hdf5):
    """HDF5 with gzip."""

    name = "HDF5, gzip"
    note = "level 4; an image to a chunk; no checksums"
    filters: ClassVar[dict[str, Any]] = {"compression": "gzip", "compression_opts": 4}


class Memmap(Format):
    """Codes as they are, in one file for each map."""

    name = "memmap, 8 bit"
    note = "not compressed; a crop reads only its pages"

    def _shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        if name == "hardness":
            return "u1", (self.images, self.setting.height, self.setting.width)
        return "f2", (self.images, *self.setting.grid)

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Two files."""
        self.images = len(maps)
        for name in ("hardness", "discrepancy"):
            dtype, shape = self._shape(name)
            data = np.memmap(self.folder / name, dtype, "w+", shape=shape)
            for index, item in enumerate(maps):
                data[index] = getattr(item.maps, name)
            data.flush()

    def open(self) -> None:
        """Map both files."""
        self._data = [
            np.memmap(self.folder / name, dtype, "r", shape=shape)
            for name, (dtype, shape) in (
                (name, self._shape(name)) for name in ("hardness", "discrepancy")
            )
        ]

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Copies of the windows."""
        hardness, discrepancy = self._data
        return np.array(hardness[(image, *pixels)]), np.array(discrepancy[(image, *points)])


class ZarrDefaults(Format):
    """A Zarr group as zarr-python makes it when nothing is asked for."""

    name = "zarr-python, defaults"
    note = "its own choice of chunks and codec; no shards, no checksums"

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Two arrays, written an image at a time."""
        group = zarr.create_group(self.folder / "maps.zarr", overwrite=True)
        for name in ("hardness", "discrepancy"):
            first = getattr(maps[0].maps, name)
            shape = (len(maps), *first.shape)
            array = group.create_array(name, shape=shape, dtype=first.dtype)
            # By whole chunks: anything else would read and write each of them many times.
            step = array.chunks[0]
            for start in range(0, len(maps), step):
                part = [getattr(item.maps, name) for item in maps[start : start + step]]
                array[start : start + len(part)] = np.stack(part)

    def open(self) -> None:
        """The group."""
        group = zarr.open_group(self.folder / "maps.zarr", mode="r")
        self._arrays = group["hardness"], group["discrepancy"]

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """Plain indexing."""
        hardness, discrepancy = self._arrays
        return np.asarray(hardness[(image, *pixels)]), np.asarray(discrepancy[(image, *points)])


class LitData(Format):
    """LitData's binary chunks, read one item at a time."""

    name = "LitData"
    note = "64 MB chunks, not compressed; a read takes the whole item"

    @classmethod
    def missing(cls) -> str:
        """Whether it is installed."""
        return "" if importlib.util.find_spec("litdata") else "not installed (pip install litdata)"

    @classmethod
    def load(cls) -> None:
        """LitData and torch."""
        importlib.import_module("litdata")

    def write(self, maps: Sequence[TeacherMaps]) -> None:
        """Through the writer below ``litdata.optimize``, without its processes."""
        from litdata.streaming.cache import Cache

        cache = Cache(str(self.folder), chunk_bytes=64 << 20)
        for index, item in enumerate(maps):
            cache[index] = {
                "hardness": item.maps.hardness,
                "discrepancy": np.ascontiguousarray(item.maps.discrepancy),
            }
        cache.done()
        cache.merge()

    def open(self) -> None:
        """A streaming data set on the local folder."""
        from litdata import StreamingDataset

        self._data = StreamingDataset(str(self.folder))

    def read(self, image: int, pixels: Window, points: Window) -> Crop:
        """The whole item, then the window."""
        item = self._data[image]
        return (
            np.asarray(item["hardness"])[pixels].copy(),
            np.asarray(item["discrepancy"])[points].copy(),
        )


def write_store(setting: Setting, folder: Path, maps: Sequence[TeacherMaps]) -> float:
    """A complete map store with everything but logits; images repeat when maps run out.

    Returns:
        Seconds of processor time spent in writing.
    """
    started = time.process_time()
    writer = MapWriter.create(
        folder,
        schema=setting.schema(),
        images=[setting.record(index) for index in range(setting.images)],
        identity={"teacher": "benchmark"},
    )
    for shard in writer.pending_shards():
        writer.write_shard(shard, [named(maps, row) for row in writer.shard_rows(shard)])
    writer.publish()
    return time.process_time() - started


def named(maps: Sequence[TeacherMaps], row: int) -> Any:
    """The maps of a row, under its name and without logits."""
    return replace(maps[row % len(maps)].maps, image_id=f"{row:04d}", logits=None)


FORMATS: tuple[type[Format], ...] = (
    MapStore,
    MapStoreInRam,
    MapStoreByZarr,
    ZarrDefaults,
    Hdf5Lz4,
    Hdf5Gzip,
    LitData,
    Png,
    Npz,
    Npy,
    Memmap,
)

"""One contract for every place where a store can live; object stores over real HTTP."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from rdd_storage import (
    ExtraNotInstalledError,
    LocationError,
    StoreAccessError,
    StoreUnavailableError,
    StoreWriteError,
)
from rdd_storage.location import Location, locate


class TestContract:
    def test_objects_are_written_read_and_removed(self, place: str) -> None:
        location = locate(f"{place}/a")
        assert location.get("x/y") is None
        assert location.size("x/y") is None
        location.put("x/y", b"first")
        location.put("x/y", bytearray(b"second"))
        location.put("x/z", memoryview(b""))
        assert location.get("x/y") == b"second"
        assert location.get("x/z") == b""
        assert location.size("x/y") == 6
        assert list(location.get_many(["x/z", "none", "x/y"])) == [b"", None, b"second"]
        location.delete("x/y")
        location.delete("x/y")
        assert location.get("x/y") is None

    def test_listing(self, place: str) -> None:
        root = locate(place)
        for key in ("b.zarr/c/0/0", "b.zarr/zarr.json", "a.zarr/zarr.json", "loose"):
            root.put(key, key.encode())
        assert list(root.list_sizes()) == [
            ("a.zarr/zarr.json", 16), ("b.zarr/c/0/0", 12), ("b.zarr/zarr.json", 16), ("loose", 5),
        ]  # fmt: skip
        assert [key for key, _ in root.list_sizes("b.zarr")] == ["b.zarr/c/0/0", "b.zarr/zarr.json"]
        children = root.children()
        assert [child.url.rpartition("/")[2] for child in children] == ["a.zarr", "b.zarr"]
        assert [key for key, _ in children[1].list_sizes()] == ["c/0/0", "zarr.json"]
        assert children[0].get("zarr.json") == b"a.zarr/zarr.json"
        assert locate(f"{place}/none").children() == []
        assert list(locate(f"{place}/none").list_sizes()) == []

    def test_parts_of_objects(self, place: str) -> None:
        location = locate(place)
        location.put("k", bytes(range(100)))
        assert location.get_ranges("k", [(3, 2), (90, 10), (0, 1)]) == [
            bytes([3, 4]), bytes(range(90, 100)), bytes([0]),
        ]  # fmt: skip
        assert location.get_tail("k", 3) == bytes([97, 98, 99])
        assert location.get_tail("k", 1000) == bytes(range(100))
        assert location.get_ranges("none", [(0, 1)]) is None
        assert location.get_tail("none", 4) is None

    def test_one_of_many_creates(self, place: str) -> None:
        location = locate(place)
        barrier = threading.Barrier(6)

        def create(number: int) -> bool:
            barrier.wait()
            return location.create("lease", f"holder {number}".encode())

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(create, range(6)))
        assert sum(won) == 1
        assert location.get("lease") == f"holder {won.index(True)}".encode()
        assert not location.create("lease", b"late")
        assert [key for key, _ in location.list_sizes()] == ["lease"]

    def test_replacing_loses_no_update(self, place: str) -> None:
        location = locate(place)
        assert location.get_with_token("count") is None
        assert location.create("count", b"0")

        def add(times: int) -> None:
            while times:
                found = location.get_with_token("count")
                assert found is not None
                content, token = found
                # Unique contents: who wrote it stands in it.
                name = f"{int(content.split()[0]) + 1} {threading.get_ident()} {times}"
                times -= location.replace_if("count", name.encode(), token)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(add, [4, 4, 4]))
        content = location.get("count")
        assert content is not None
        assert content.split()[0] == b"12"

    def test_replacing_what_has_changed_or_gone_fails(self, place: str) -> None:
        location = locate(place)
        location.put("k", b"one")
        found = location.get_with_token("k")
        assert found is not None
        location.put("k", b"two")
        assert not location.replace_if("k", b"three", found[1])
        assert location.get("k") == b"two"
        location.delete("k")
        assert not location.replace_if("k", b"three", found[1])
        assert location.get("k") is None

    def test_a_location_is_a_value(self, place: str) -> None:
        location = locate(f"{place}/a/")
        location.put("k", b"v")
        copy: Location = pickle.loads(pickle.dumps(location))
        assert copy == location
        assert copy.get("k") == b"v"
        assert str(location) == location.url == f"{place}/a"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3:/bucket/path", "two slashes"),
        ("s3://", "expected s3://bucket/path"),
        ("s3://bucket/../other", "expected s3://bucket/path"),
        ("s3://bucket/path?versionId=3", "with user, query or fragment"),
        ("https://host/path", "got the scheme 'https'"),
        ("file://host/path", "expected file:///absolute/path"),
    ],
)
def test_urls_that_name_no_place(url: str, expected: str) -> None:
    with pytest.raises(LocationError, match=expected):
        locate(url)


OTHER_PROCESS = """
import pickle, sys
from rdd_storage import LocationError
location = pickle.load(sys.stdin.buffer)
try:
    location.get("k")
except LocationError as error:
    sys.exit(0 if "whose memory it is" in str(error) else 2)
sys.exit(1)
"""


def test_memory_belongs_to_its_process(place_in_memory: str) -> None:
    location = locate(place_in_memory)
    location.put("k", b"v")
    command = [sys.executable, "-c", OTHER_PROCESS]
    result = subprocess.run(command, input=pickle.dumps(location), timeout=120, check=False)
    assert result.returncode == 0


FORKED = """
import os, sys
from rdd_storage import ForkedProcessError
from rdd_storage.location import locate
location = locate("memory://name/path")
location.put("k", b"v")
child = os.fork()
if child == 0:
    try:
        location.get("k")
    except ForkedProcessError as error:
        os._exit(0 if "forkserver" in str(error) else 2)
    os._exit(1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_gets_a_clear_error() -> None:
    """The client's threads do not live on in a fork: a request would wait for ever."""
    result = subprocess.run([sys.executable, "-c", FORKED], timeout=120, check=False)
    assert result.returncode == 0


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ExtraNotInstalledError, match=r"pip install 'rdd-maps\[s3\]'"):
        locate("s3://bucket/path")


class TestFaults:
    @pytest.mark.parametrize("kind", [500, 503, "cut", "short"])
    def test_passing_faults_are_survived(
        self, s3: ModuleType, faults: ModuleType, place_on_s3: str, kind: int | str
    ) -> None:
        location = locate(place_on_s3)
        content = os.urandom(20_000)
        s3.fault = faults.Once(500 if isinstance(kind, str) else kind, methods=("PUT",))
        location.put("k", content)
        for read in (
            lambda: location.get("k"),
            lambda: (location.get_ranges("k", [(0, 20_000)]) or [None])[0],
            lambda: location.get_tail("k", 20_000),
        ):
            s3.fault = faults.Once(kind, methods=("GET",))
            assert read() == content
            assert s3.fault.count == 1

    def test_a_slow_answer_is_asked_for_again(
        self,
        s3: ModuleType,
        faults: ModuleType,
        place_on_s3: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("RDD_REQUEST_TIMEOUT", "1")
        location = locate(place_on_s3)
        location.put("k", b"content")
        s3.fault = faults.Once("hang", methods=("GET",))
        s3.requests.clear()
        assert location.get("k") == b"content"
        assert len(s3.requests) == 2

    @pytest.mark.parametrize("kind", [500, 503, "cut", "short"])
    def test_lasting_faults_end_in_a_clear_error(
        self, s3: ModuleType, place_on_s3: str, kind: int | str
    ) -> None:
        location = locate(place_on_s3)
        location.put("k", b"content" * 100)
        s3.fault = lambda request: kind if request.method == "GET" else None
        for read in (
            lambda: location.get("k"),
            lambda: location.get_ranges("k", [(0, 700)]),
            lambda: location.get_tail("k", 700),
        ):
            with pytest.raises(StoreUnavailableError, match=rf"^{place_on_s3}/k: ") as caught:
                read()
            assert len(str(caught.value)) < 400
        if isinstance(kind, int):
            s3.fault = lambda request: kind
            with pytest.raises(StoreWriteError, match=rf"{kind}.*a bad day"):
                location.put("k", b"other")

    def test_a_lost_answer_does_not_lose_the_lease(
        self, s3: ModuleType, faults: ModuleType, place_on_s3: str
    ) -> None:
        """The first PUT takes effect and its answer is lost; the second is refused."""
        location = locate(place_on_s3)
        forward = s3.forward

        def lose_the_answer(request: object) -> int | None:
            status = once(request)
            if status is not None:
                forward("PUT", request.path, {}, b"mine")  # type: ignore[attr-defined]
            return status

        once = faults.Once(500, methods=("PUT",))
        s3.fault = lose_the_answer
        assert location.create("lease", b"mine")
        assert once.count == 1
        assert not location.create("lease", b"yours")

    def test_refused_and_unknown_buckets(self, s3: ModuleType, place_on_s3: str) -> None:
        location = locate(place_on_s3)
        s3.fault = lambda request: 403
        with pytest.raises(StoreAccessError, match="access refused"):
            location.get("k")
        with pytest.raises(StoreWriteError, match="403"):
            location.put("k", b"v")
        s3.reset()
        nowhere = locate("s3://no-such-bucket/a")
        assert nowhere.get("k") is None
        with pytest.raises(StoreWriteError, match="there is no bucket 'no-such-bucket'"):
            nowhere.put("k", b"v")


SECRET, TOKEN = "wJalrXUtnFEMIK7MDENG", "FwoGZXIvYXdzEJr"


class TestCredentials:
    def test_a_url_must_not_carry_them(self) -> None:
        for url in (f"s3://key:{SECRET}@bucket/p", f"https://key:{SECRET}@host/p"):
            with pytest.raises(LocationError) as caught:
                locate(url)
            assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_nor_may_the_endpoint(self, place_on_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://key:{SECRET}@127.0.0.1:9")
        with pytest.raises(LocationError, match="AWS_ENDPOINT_URL") as caught:
            locate(place_on_s3).get("k")
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_they_never_show(
        self, s3: ModuleType, place_on_s3: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Real servers repeat the session token in the answer that refuses it."""
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
        location = locate(place_on_s3)
        location.put("k", b"v")
        shown = [repr(location), str(location), str(pickle.dumps(location))]
        for status in (400, 403, 500):
            s3.fault = lambda request, status=status: status
            for use in (lambda: location.get("k"), lambda: location.put("k", b"v")):
                with pytest.raises((StoreUnavailableError, StoreAccessError, StoreWriteError)) as e:
                    use()
                shown += traceback.format_exception(e.value)
        text = "".join(shown)
        assert "127.0.0.1" not in text or SECRET not in text
        assert SECRET not in text
        assert TOKEN not in text

    def test_the_usual_files_are_read(
        self, s3: ModuleType, place_on_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = tmp_path / "credentials"
        files.write_text(
            f"[team]\naws_access_key_id = AKIATEAM\naws_secret_access_key = {SECRET}\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(files))
        monkeypatch.setenv("AWS_PROFILE", "team")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        location = locate(place_on_s3)
        location.put("k", b"v")
        assert location.get("k") == b"v"
        assert any("AKIATEAM" in header for header in s3.authorizations)
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(StoreAccessError, match="nobody") as caught:
            location.get("k")
        assert SECRET not in "".join(traceback.format_exception(caught.value))

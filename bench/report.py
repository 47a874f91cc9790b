"""The report of a map store or a run: seconds to write it, bytes, seconds until a browser has it.

    python bench/report.py runs/camvid-cpu --images 24 100
    python bench/report.py maps/STORE --data configs/camvid-cpu.yaml --set data.root=PATH

Every report is written by a process of its own, as by 'rdd report', imports included. Chromium
opens it without a screen and without a network; its time is that of the load event after the start
of the navigation, the median of five.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rdd_pipeline.config import load_config
from rdd_pipeline.files import readable_bytes
from rdd_pipeline.report import write_report

GOAL_BYTES, GOAL_SECONDS = 10_000_000, 2.0
VERSIONS = ("numpy", "zarr", "tensorstore", "matplotlib", "pillow")

_CLOCK = """<script>
addEventListener("load", () => { document.title = "loaded " + performance.now(); });
</script>
</body>"""


def main() -> None:
    """Write reports, open them and print the table; or write one when called by that run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="folder of a run, or path or URL of a store")
    parser.add_argument("--data", type=Path, help="configuration with the images")
    parser.add_argument("--set", action="append", default=[], help="override a key of --data")
    parser.add_argument("--images", type=int, nargs="+", default=[24, 100])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        data = None if args.data is None else load_config(args.data, args.set).data
        write_report(args.target, out=args.write, data=data, images=args.images[0])
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines = [
        "# The report: seconds and bytes",
        "",
        f"Command: `python bench/report.py ...`, {datetime.date.today()}, {os.cpu_count()} cores. "
        f"Python {platform.python_version()}, {versions}",
        "",
        "| images shown | seconds | processor seconds | bytes | in the browser after | goals |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for images in args.images:
        with tempfile.TemporaryDirectory(prefix="rdd-bench-") as folder:
            page = Path(folder, "report.html")
            seconds, processor = timed_write(page, images, args)
            size = page.stat().st_size
            opened = statistics.median(opening_seconds(page) for _ in range(5))
        met = size < GOAL_BYTES and opened < GOAL_SECONDS
        lines.append(
            f"| {images} | {seconds:.1f} | {processor:.1f} | {readable_bytes(size)} | "
            f"{opened:.2f} s | {'met' if met else '**missed**'} |"
        )
    goals = f"Goals: below {readable_bytes(GOAL_BYTES)} and {GOAL_SECONDS:.0f} s."
    lines += ["", f"{goals} Load of the machine at the end: {os.getloadavg()[0]:.1f}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def timed_write(page: Path, images: int, args: argparse.Namespace) -> tuple[float, float]:
    """Write a report in another process; its seconds by the clock and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    options = [] if args.data is None else ["--data", str(args.data)]
    options += [f"--set={change}" for change in args.set]
    subprocess.run(
        [sys.executable, __file__, args.target, *options, f"--images={images}", f"--write={page}"],
        check=True,
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def opening_seconds(page: Path) -> float:
    """Seconds from the start of the navigation to the load event."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("expected Chromium, got none; install it with: scripts/install-system-packages")
    clocked = page.with_name("clocked.html")
    html = page.read_text(encoding="utf-8")
    clocked.write_text(html.replace("</body>", _CLOCK), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}",
         "--dump-dom", clocked.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<title>loaded ([\d.]+)</title>", done.stdout)
    if found is None:
        sys.exit(f"{page}: expected the page to load, got no load event")
    return float(found.group(1)) / 1000.0


if __name__ == "__main__":
    main()

"""What a new stack needs before its worker starts: bucket, work pool, deployments.

``python -m rdd_flows.stack.init``; the addresses come from the environment. Everything that is
there already is left as it is, and deployments are brought up to date.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path


def make_bucket(name: str) -> None:
    """Make a bucket on the server that ``AWS_ENDPOINT_URL`` names, unless it is there."""
    import s3fs

    server = s3fs.S3FileSystem()
    if not server.exists(name):
        server.mkdir(name)


def make_work_pool(name: str) -> None:
    """Make a work pool whose worker starts flows as processes, unless it is there."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    # A flow that prints through its worker ends with it: by a broken pipe, hours of work in.
    template["variables"]["properties"]["stream_output"]["default"] = False
    pool = WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template)
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)


def deploy(prefect_file: Path) -> None:
    """Register the deployments of a ``prefect.yaml``, and what watches over their runs.

    ``RDD_CONFIG`` is the configuration that they run; its relative paths begin in ``RDD_WORKDIR``,
    by default the current folder.

    Raises:
        ConfigError: The file is wrong.
    """
    from rdd_flows.deployments import check_prefect_file, install_automations

    path = prefect_file.absolute()
    check_prefect_file(path)
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all",
         "--prefect-file", path.name],
        check=True,
        cwd=path.parent,
        env={"RDD_WORKDIR": str(Path.cwd())} | os.environ,
    )  # fmt: skip
    sys.stdout.write(f"{install_automations()}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bucket", help="bucket to make")
    parser.add_argument("--pool", required=True, help="work pool to make")
    parser.add_argument("--prefect-file", type=Path, help="deployments to register")
    options = parser.parse_args()
    if options.bucket:
        make_bucket(options.bucket)
    make_work_pool(options.pool)
    if options.prefect_file and not os.environ.get("RDD_CONFIG"):
        parser.error("expected the path of a configuration in RDD_CONFIG, got none; set it")
    if options.prefect_file:
        deploy(options.prefect_file)


if __name__ == "__main__":
    main()

"""What is registered with a Prefect server: schedules, triggers and the watch over dead runs."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentStatus, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY
from pydantic import ValidationError

from rdd_flows.events import MAPS_COMPLETE, RUN_LABEL
from rdd_pipeline.errors import ConfigError

ZOMBIES = "rdd: flow runs whose process is gone"
_MISSED_HEARTBEATS = 3

STORE_PARAMETERS: dict[str, Any] = {
    "store": {"__prefect_kind": "jinja", "template": "{{ event.payload.store }}"},
    # A template gives text; the flow takes a number.
    "version": {
        "__prefect_kind": "json",
        "value": {"__prefect_kind": "jinja", "template": "{{ event.payload.version }}"},
    },
}
"""Parameters that a flow of students takes from the event ``maps.complete``."""


def check_schedule(cron: str, timezone: str) -> CronSchedule:
    """The schedule of a cron expression.

    Args:
        cron: Five fields, as in crontab.
        timezone: Name of the IANA time zone data base.

    Raises:
        ConfigError: One of them is wrong.
    """
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        if any(problem["loc"] == ("cron",) for problem in error.errors()):
            raise ConfigError(
                "cron: expected five fields (minute, hour, day, month, weekday) such as "
                f"'0 2 * * *', got '{cron}'"
            ) from None
        raise ConfigError(
            f"timezone: expected a name such as Europe/Berlin or UTC, got '{timezone}'"
        ) from None


def check_prefect_file(path: Path) -> list[str]:
    """Check the deployments of a ``prefect.yaml``; returns their names.

    Raises:
        ConfigError: It cannot be read, a schedule is wrong, or two deployments of one flow have
            one name; all of them are listed.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        deployments = tree["deployments"]
        names = [f"{item['entrypoint']}/{item['name']}" for item in deployments]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected the deployments of a prefect.yaml, each with name and entrypoint "
            f"({error})"
        ) from error
    problems = [
        f"two deployments '{name}'; give one of them another name"
        for name, count in Counter(names).items()
        if count > 1
    ]
    for item in deployments:
        for schedule in item.get("schedules") or ():
            if "cron" not in schedule:
                continue
            try:
                check_schedule(str(schedule["cron"]), str(schedule.get("timezone", "UTC")))
            except ConfigError as error:
                problems.append(f"deployment '{item['name']}': {error}")
    if problems:
        lines = [f"{path}: {len(problems)} problem(s)", *problems]
        raise ConfigError("\n  ".join(lines))
    return [str(item["name"]) for item in deployments]


def students_trigger(run: str) -> DeploymentEventTrigger:
    """Runs a deployment for every new version of a run's store.

    Args:
        run: Name of the run's configuration.
    """
    return DeploymentEventTrigger(
        name=f"rdd: new maps of {run}",
        expect={MAPS_COMPLETE},
        match={"prefect.resource.id": "rdd.store.*", RUN_LABEL: run},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
        parameters=STORE_PARAMETERS,
    )


def install_automations() -> str:
    """Let the server mark flow runs as crashed whose process has gone; returns what was done.

    A run sends heartbeats; a process that is killed sends no more, and nobody else would say how
    it ended. Runs under a Prefect worker are also watched by that.
    """
    wanted = zombie_automation()
    with get_client(sync_client=True) as client:
        found = next(iter(client.read_automations_by_name(wanted.name)), None)
        if found is None:
            client.create_automation(wanted)
            return f"installed: {wanted.name}"
        # A change makes the server forget which runs it waits for.
        if (found.trigger, found.actions) != (wanted.trigger, wanted.actions):
            client.update_automation(found.id, wanted.model_copy(update={"enabled": found.enabled}))
            return f"updated: {wanted.name}"
    return f"up to date: {wanted.name}"


def zombie_automation() -> AutomationCore:
    """What marks flow runs as crashed that send no heartbeats any more."""
    every = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() or 180
    return AutomationCore(
        name=ZOMBIES,
        description=f"Crashed after {_MISSED_HEARTBEATS} missed heartbeats, one every {every} s.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                "prefect.flow-run.Completed",
                "prefect.flow-run.Failed",
                "prefect.flow-run.Cancelled",
                "prefect.flow-run.Crashed",
                "prefect.flow-run.AwaitingRetry",
            },
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_MISSED_HEARTBEATS * every),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                force=False,
                state=StateType.CRASHED,
                message="No heartbeat any more: the process of this run is gone.",
            )
        ],
    )


def refuse_served(names: list[str]) -> None:
    """Refuse names of deployments that another process serves or works on just now.

    Args:
        names: ``FLOW/DEPLOYMENT``.

    Raises:
        ConfigError: One is.
    """
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                found = client.read_deployment_by_name(name)
            except ObjectNotFound:
                continue
            if found.status == DeploymentStatus.READY and not found.paused:
                raise ConfigError(
                    f"deployment '{name}': another process serves it, or did until a minute ago; "
                    "end that one, or give this run another name"
                )

"""The API under /api/v1: what docs/wire.md promises, and the lists that people and tools read."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response

from optwatch_server import wire
from optwatch_server.paging import alerts
from optwatch_server.runs import events, heartbeats, recordings
from optwatch_server.runs import registry as runs
from optwatch_server.service import Service

from . import discovery
from .resources import AlertPage, AlertResource, EventPage, EventResource, RunDetail, RunPage, RunResource

Limit = Annotated[int, Query(ge=1, le=500)]
Cursor = Annotated[str | None, Query(max_length=500, description="`next` of the page before")]
Tags = Annotated[list[wire.Label], Query(max_length=16, description="`name` or `name=value`; all must fit")]
_PROBLEM = {"application/problem+json": {"schema": {"type": "object"}}}


def api_routes(service: Service) -> APIRouter:
    """Return the routes of the API over one service."""
    router = APIRouter(prefix="/api/v1", responses={422: {"description": "RFC 9457 problem", "content": _PROBLEM}})
    database, clock = service.database, service.clock

    @router.post("/runs", status_code=201, responses={200: {"model": RunResource, "description": "known already"}})
    def create_run(run: wire.Run, response: Response) -> RunResource:
        """Make a run known; repeating it changes nothing."""
        with database.write() as session:
            new = runs.create(session, run, clock())
            resource = RunResource.of(runs.get(session, run.id), runs.tags(session, [run.id])[run.id])
        response.status_code = 201 if new else 200
        response.headers["Location"] = f"/api/v1/runs/{run.id}"
        return resource

    @router.get("/runs")
    def list_runs(
        project: wire.Label | None = None,
        team: wire.Label | None = None,
        status: wire.Status | None = None,
        tag: Tags = (),  # type: ignore[assignment]  # FastAPI wants a list, and a list must not be a default
        limit: Limit = 50,
        after: Cursor = None,
    ) -> RunPage:
        """List runs, newest first."""
        with database.read() as session:
            page, following = runs.newest(session, runs.Filters(project, team, status, tag), limit, after)
            tags = runs.tags(session, [run.id for run in page])
            return RunPage(runs=[RunResource.of(run, tags[run.id]) for run in page], next=following)

    @router.get("/runs/{run_id}")
    def get_run(run_id: wire.RunId) -> RunDetail:
        """Return a run with the latest beat of each of its ranks."""
        with database.read() as session:
            run = runs.get(session, run_id)
            return RunDetail.with_ranks(run, runs.tags(session, [run_id])[run_id], heartbeats.of_run(session, run_id))

    @router.post("/runs/{run_id}/finish")
    def finish_run(run_id: wire.RunId, finish: wire.Finish) -> RunResource:
        """End a run; the first end counts."""
        with database.write() as session:
            runs.finish(session, run_id, finish, clock())
            return RunResource.of(runs.get(session, run_id), runs.tags(session, [run_id])[run_id])

    @router.get("/runs/{run_id}/events")
    def list_events(run_id: wire.RunId, limit: Limit = 100, after: Cursor = None) -> EventPage:
        """List the events of a run in the order in which they occurred."""
        with database.read() as session:
            runs.get(session, run_id)
            page, following = events.of_run(session, run_id, limit, after)
            return EventPage(events=[EventResource.of(event) for event in page], next=following)

    @router.get("/runs/{run_id}/alerts")
    def list_alerts(run_id: wire.RunId, limit: Limit = 100, after: Cursor = None) -> AlertPage:
        """List the alerts of a run, newest first, as far as Alertmanager told of them."""
        with database.read() as session:
            runs.get(session, run_id)
            page, following = alerts.of_run(session, run_id, limit, after)
            return AlertPage(alerts=[AlertResource.of(alert) for alert in page], next=following)

    @router.post(
        "/runs/{run_id}/recordings",
        status_code=201,
        responses={200: {"model": wire.RecordingAccepted, "description": "known already, or one too many"}},
    )
    def receive_recording(run_id: wire.RunId, recording: wire.Recording, response: Response) -> wire.RecordingAccepted:
        """Take the black box of one rank; of a run, the newest 4 of each of the first 16 ranks are kept."""
        new, kept = recordings.receive(database, service.store, run_id, recording, clock())
        response.status_code = 201 if new else 200
        return wire.RecordingAccepted(id=str(recording.id), kept=kept)

    @router.get("/runs/{run_id}/recordings")
    def list_recordings(run_id: wire.RunId) -> recordings.RecordingList:
        """List the recordings of a run, newest first."""
        with database.read() as session:
            runs.get(session, run_id)
            found = recordings.of_run(session, run_id)
            return recordings.RecordingList(recordings=[recordings.RecordingResource.of(row) for row in found])

    @router.get("/runs/{run_id}/recordings/{recording_id}", response_model=wire.Recording)
    def get_recording(run_id: wire.RunId, recording_id: UUID) -> Response:
        """Return a recording with all its numbers, as it was sent."""
        with database.read() as session:
            path = recordings.find(session, run_id, recording_id).path
        return Response(recordings.document(service.store, path), media_type="application/json")

    @router.post("/heartbeats")
    def receive_heartbeats(message: wire.Heartbeats) -> wire.HeartbeatsAccepted:
        """Take the beats of any number of runs and ranks."""
        with database.write() as session:
            return heartbeats.receive(session, message.beats, clock())

    @router.post("/events")
    def receive_events(message: wire.Events) -> wire.EventsAccepted:
        """Take events; one that was taken before is counted as a duplicate."""
        with database.write() as session:
            answer = events.receive(session, message.events, clock(), page=service.pager.enabled)
        service.pager.wake()
        return answer

    @router.post("/alerts")
    def receive_alerts(message: alerts.Webhook) -> alerts.AlertsAccepted:
        """Take the webhook of Alertmanager, version 4; alerts about no known run are ignored."""
        with database.write() as session:
            return alerts.receive(session, message, clock(), service.settings.public_url)

    @router.get("/sd")
    def service_discovery() -> list[discovery.TargetGroup]:
        """List, for Prometheus's http_sd, where the agents of live runs can be scraped."""
        with database.read() as session:
            return discovery.targets(session, clock())

    return router

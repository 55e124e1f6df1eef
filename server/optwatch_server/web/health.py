"""/healthz, /readyz and /metrics: what the platform that runs the server asks."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import generate_latest
from sqlalchemy import text

from optwatch_server.service import Service


def health_routes(service: Service) -> APIRouter:
    """Return the routes of the server's own health."""
    router = APIRouter()

    @router.get("/healthz")
    def alive() -> dict[str, str]:
        """Answer as long as the process does; the database is none of its business, as a restart would not mend it."""
        return {"status": "ok"}

    @router.get("/readyz")
    def ready() -> dict[str, str]:
        """Answer 200 while the database does, and 503 otherwise."""
        with service.database.read() as session:
            session.execute(text("SELECT 1"))
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Serve every metric of the server's catalogue."""
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router

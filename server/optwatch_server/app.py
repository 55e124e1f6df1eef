"""The application: routes, limits and errors over one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from .metrics.endpoint import RequestMetrics
from .review.report import review_routes
from .service import Service
from .web.api import api_routes
from .web.health import health_routes
from .web.limits import BodyLimit
from .web.pages import Pages, page_routes
from .web.problems import Problem, from_validation, wants_page


def create_app(service: Service, *, sweep: bool = True) -> FastAPI:
    """Return the ASGI application over `service`, whose database is migrated already.

    With `sweep` false no thread looks for lost runs or sends pages: tests call `service.sweeper.sweep` and
    `service.pager.send` instead.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if sweep:
            service.sweeper.start()
            service.pager.start()
        yield
        service.sweeper.stop()
        service.pager.stop()

    app = FastAPI(
        title="optwatch",
        version=version("optwatch"),
        lifespan=lifespan,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # FastAPI's pages load scripts from the internet
        redoc_url=None,
    )
    pages = Pages(service)
    app.include_router(health_routes(service))
    app.include_router(api_routes(service))
    app.include_router(page_routes(pages))
    app.include_router(review_routes(pages))
    _answer_errors(app, pages)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestMetrics, requests=service.requests)
    return app


def _answer_errors(app: FastAPI, pages: Pages) -> None:
    """Answer every error with a problem document, or with a page where a person asked."""

    def answer(request: Request, problem: Problem) -> Response:
        if wants_page(request):
            return pages.problem(problem)
        return problem.response()

    @app.exception_handler(Problem)
    async def _problem(request: Request, error: Problem) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, from_validation(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        asked = f"{request.method} {request.url.path}"
        detail = {
            400: "the body cannot be parsed: send one JSON object",
            404: f"{asked} does not exist: the API is described at /api/v1/openapi.json, the run list is at /",
            405: f"{asked} is not allowed: the API is described at /api/v1/openapi.json",
        }.get(error.status_code, str(error.detail))
        response = answer(request, Problem(error.status_code, detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeoutError)
    async def _no_database(request: Request, _error: Exception) -> Response:
        return answer(request, Problem(503, "the database does not answer: nothing was kept, send it again later"))

    @app.exception_handler(Exception)
    async def _failed(request: Request, _error: Exception) -> Response:
        return answer(request, Problem(500, "the server failed at this request: its log has the traceback"))

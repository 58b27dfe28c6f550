"""The HTTP application: which path leads where."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ropeway._version import __version__
from ropeway.accounts import Account, Accounts, read_prices
from ropeway.api import (
    admin,
    anthropic,
    anthropic_errors,
    batches,
    canary,
    chat,
    compare,
    completions,
    deferred,
    deployments,
    docs,
    embeddings,
    feed,
    files,
    health,
    keys,
    models,
    replies,
    requests,
    responses,
    schema,
    scores,
    tokens,
    ui,
    usage,
)
from ropeway.api.anthropic_schema import CountRequest, InputTokens, MessageBody, MessageErrorEnvelope, MessageRequest
from ropeway.api.canary_schema import CanaryChange, CanaryList, CanaryStart, CanaryState
from ropeway.api.deferred import Deferring
from ropeway.api.embedding_schema import (
    EmbeddingList,
    EmbeddingRequest,
    RerankList,
    RerankRequest,
    ScoreList,
    ScoreRequest,
)
from ropeway.api.errors import HttpError
from ropeway.api.middleware import ADMIN, PUBLIC, Gate, refusal
from ropeway.api.refusals import Refusals
from ropeway.api.registry import RequestList, RequestState
from ropeway.api.response_store import ResponseStore
from ropeway.api.responses_schema import DeletedResponse, InputItems, ResponseBody, ResponseRequest, TokenCount
from ropeway.api.state import Api, api_of
from ropeway.api.tracing import Tracing
from ropeway.config import ServerConfig
from ropeway.jobs.running import Jobs
from ropeway.observe.metrics import Metrics
from ropeway.observe.otlp import Collector
from ropeway.service.request import TextService

_DESCRIPTION = "OpenAI's API and Anthropic's Messages for the model that this server runs, with vLLM's parameters."
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def create_app(
    service: TextService, config: ServerConfig, metrics: Metrics, *, front: FastAPI | None = None
) -> FastAPI:
    """The application around `service`. Its `state.api` is the shared `Api`.

    With `front` it answers for one more model of that application's server. It shares the count of answers, the known
    requests and the stored responses with it, and has no gate: whatever comes here has passed that of `front`.
    """
    app = FastAPI(
        title="Ropeway", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None, openapi_url=None
    )
    if front is not None:
        app.state.api = front.state.api.beside(service, metrics, config)
        app.state.responses = front.state.responses
        app.state.accounts = front.state.accounts
        app.state.jobs = front.state.jobs
        app.add_middleware(Refusals)
    else:
        app.state.api = Api(service, config, metrics)
        app.state.hub = feed.Hub(app.state.api)
        app.state.tracing = None
        if config.otlp_endpoint is not None:
            app.state.tracing = Tracing(Collector(config.otlp_endpoint, config.otlp_headers))
            app.state.api.requests.listeners.append(app.state.tracing.ended)
        app.state.responses = ResponseStore(
            count=config.response_store_count,
            size=int(config.response_store_mib * 1024 * 1024),
            ttl=config.response_store_ttl,
        )
        longest = int(config.max_body_mib * 1024 * 1024)
        prices = read_prices(Path(config.prices)) if config.prices else None
        app.state.accounts = Accounts(config.data_path, prices)
        app.state.jobs = Jobs(config, app.state.accounts, longest=longest, serves=app.state.api.serves)
        metrics.include(app.state.jobs.families)
        app.add_middleware(Deferring)
        metrics.include(app.state.accounts.families)
        app.add_middleware(Gate, config=config, metrics=metrics, accounts=app.state.accounts)
    app.add_exception_handler(HTTPException, _not_here)
    app.state.simulator = compare.Simulator()
    _add_routes(app)
    return app


def _add_routes(app: FastAPI) -> None:
    taken: set[str] = set()

    def add(method: str, path: str, endpoint: Callable[..., Any], entry: dict[str, Any]) -> None:
        name = re.sub(r"\W+", "_", path.removeprefix("/v1").replace(":path", "")).strip("_")
        if method not in ("GET", "POST") or name in taken:
            name = f"{method.lower()}_{name}"
        taken.add(name)
        named = [
            {"name": found, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for found in re.findall(r"{(\w+)", path)
        ]
        if named:
            entry = {**entry, "parameters": [*named, *entry.get("parameters", ())]}
        app.add_api_route(
            path, endpoint, methods=[method], openapi_extra=entry, operation_id=name, response_class=Response
        )
        if path in PUBLIC:
            app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    op = docs.operation
    both: dict[str, Any] = {"streams": True, "deferrable": True}
    chat_body, text_body = schema.ChatCompletionRequest, schema.CompletionRequest
    add("POST", "/v1/chat/completions", chat.chat_completions, op(replies.ChatCompletion, chat_body, **both))
    add("POST", "/v1/completions", completions.completions, op(replies.Completion, text_body, **both))
    add("POST", "/v1/responses", responses.create_response, op(ResponseBody, ResponseRequest, **both))
    add("POST", "/v1/responses/input_tokens", responses.count_tokens, op(TokenCount, ResponseRequest))
    one, parameters = "/v1/responses/{response_id}", responses.GET_PARAMETERS
    add("GET", one, responses.get_response, op(ResponseBody, streams=True, parameters=parameters))
    add("DELETE", one, responses.delete_response, op(DeletedResponse))
    add("POST", one + "/cancel", responses.cancel_response, op(ResponseBody))
    items = op(InputItems, parameters=responses.ITEM_PARAMETERS)
    add("GET", one + "/input_items", responses.list_input_items, items)
    wrong, path = MessageErrorEnvelope, anthropic_errors.PATH
    add("POST", path, anthropic.create_message, op(MessageBody, MessageRequest, error=wrong, **both))
    add("POST", path + "/count_tokens", anthropic.count_tokens, op(InputTokens, CountRequest, error=wrong))
    add("POST", "/v1/embeddings", embeddings.embeddings, op(EmbeddingList, EmbeddingRequest, deferrable=True))
    add("POST", "/v1/score", scores.score, op(ScoreList, ScoreRequest, deferrable=True))
    add("POST", "/v1/rerank", scores.rerank, op(RerankList, RerankRequest, deferrable=True))
    for path, endpoint in (("/score", scores.score), ("/rerank", scores.rerank), ("/v2/rerank", scores.rerank)):
        app.add_api_route(path, endpoint, methods=["POST"], include_in_schema=False, response_class=Response)
    add("GET", "/v1/models", models.list_models, op(schema.ModelList))
    add("GET", "/v1/models/{model:path}", models.get_model, op(schema.ModelCard))
    add("POST", "/tokenize", tokens.tokenize, op(schema.TokenizeResponse, schema.TokenizeRequest))
    add("POST", "/detokenize", tokens.detokenize, op(schema.DetokenizeResponse, schema.DetokenizeRequest))
    listing = op(RequestList, parameters=requests.LIST_PARAMETERS)
    add("GET", "/v1/requests", requests.list_requests, listing)
    add("GET", "/v1/requests/{id}", requests.get_request, op(RequestState))
    add("DELETE", "/v1/requests/{id}", requests.cancel_request, op(RequestState))
    _add_durable(add)
    add("GET", "/v1/usage", usage.get_usage, usage.with_csv(op(usage.UsageList, parameters=usage.PARAMETERS)))
    add("GET", "/health", health.health, op(None))
    add("GET", "/ping", health.health, op(None))
    add("GET", "/livez", health.livez, op(None))
    add("GET", "/readyz", health.readyz, op(schema.Readiness))
    add("GET", "/version", health.version, op(schema.Version))
    add("GET", "/load", health.load, op(schema.Load))
    add("GET", "/metrics", health.metrics, op(None))
    add("GET", "/admin/scheduler", admin.get_scheduler, op(schema.SchedulerState))
    add("PUT", "/admin/scheduler", admin.put_scheduler, op(schema.SchedulerState, schema.SchedulerChange))
    add("GET", "/admin/queue", admin.get_queue, op(schema.QueueState))
    add("GET", "/admin/pins", admin.get_pins, op(schema.PinList))
    add("PUT", "/admin/pins/{name}", admin.put_pin, op(schema.PinList, schema.PinRequest))
    add("DELETE", "/admin/pins/{name}", admin.delete_pin, op(schema.PinList))
    add("GET", "/admin/keys", keys.list_keys, op(keys.KeyList))
    add("POST", "/admin/keys", keys.create_key, op(keys.KeyMade, keys.KeyRequest))
    add("DELETE", "/admin/keys/{key_id}", keys.revoke_key, op(Account))
    state = deployments.DeploymentState
    add("GET", "/admin/deployments", deployments.list_deployments, op(deployments.DeploymentList))
    add("POST", "/admin/deployments/{name}/start", deployments.start_deployment, op(state))
    add("POST", "/admin/deployments/{name}/stop", deployments.stop_deployment, op(state))
    one = "/admin/canary/{route:path}"
    add("GET", "/admin/canary", canary.list_canaries, op(CanaryList))
    add("PUT", one, canary.start_canary, op(CanaryState, CanaryStart))
    add("PATCH", one, canary.change_canary, op(CanaryState, CanaryChange))
    add("DELETE", one, canary.forget_canary, op(CanaryList))
    app.add_api_route(feed.PATH, feed.feed, methods=["GET"], include_in_schema=False)
    app.add_api_route("/openapi.json", _openapi, methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    app.add_api_route("/ui/compare", compare.compare, methods=["POST"], include_in_schema=False)
    for path in ui.HOMES:
        app.add_api_route(path, ui.home, methods=["GET", "HEAD"], include_in_schema=False)
    for path in ui.ASSETS:
        app.add_api_route(path, ui.asset, methods=["GET", "HEAD"], include_in_schema=False)


def _add_durable(add: Callable[[str, str, Callable[..., Any], dict[str, Any]], None]) -> None:
    """Files, batches, and the jobs that deferred requests become."""
    op = docs.operation
    path, one = files.PATH, files.PATH + "/{file_id}"
    add("POST", path, files.upload_file, op(files.FileBody) | {"requestBody": files.UPLOAD})
    add("GET", path, files.list_files, op(files.FileList, parameters=files.LIST_PARAMETERS))
    add("GET", one, files.get_file, op(files.FileBody))
    add("DELETE", one, files.delete_file, op(files.DeletedFile))
    add("GET", one + "/content", files.get_content, docs.download())
    path, one = "/v1/batches", "/v1/batches/{batch_id}"
    add("POST", path, batches.create_batch, op(batches.BatchBody, batches.BatchRequest))
    add("GET", path, batches.list_batches, op(batches.BatchList, parameters=batches.LIST_PARAMETERS))
    add("GET", one, batches.get_batch, op(batches.BatchBody))
    add("POST", one + "/cancel", batches.cancel_batch, op(batches.BatchBody))
    path, one = deferred.PATH, deferred.PATH + "/{job_id}"
    add("GET", path, deferred.list_jobs, op(deferred.JobList, parameters=deferred.LIST_PARAMETERS))
    add("GET", one, deferred.get_job, op(deferred.Job))
    add("DELETE", one, deferred.delete_job, op(deferred.DeletedJob))
    add("POST", one + "/cancel", deferred.cancel_job, op(deferred.Job))


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of `app`, made once."""
    if app.openapi_schema is None:
        spec = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        spec.setdefault("components", {})["schemas"] = docs.components()
        spec["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, entry in spec["paths"].items():
            for one in entry.values():
                one["security"] = [] if path in PUBLIC else [{"key": []}, *([] if path.startswith(ADMIN) else [{}])]
        app.openapi_schema = spec
    return app.openapi_schema


async def _openapi(request: Request) -> Response:
    return JSONResponse(describe(request.app))


async def _docs(request: Request) -> Response:
    text = docs.page(describe(request.app), api_of(request).service.model_name, f"http://{request.url.netloc}")
    return HTMLResponse(text, headers={"content-security-policy": _PAGE_POLICY})


async def _not_here(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, as error objects."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"There is nothing at {request.method} {request.url.path[:256]}. See /docs for all paths.",
        405: f"{request.method[:16]} is not allowed at {request.url.path[:256]}. See /docs.",
    }
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    refused = HttpError(error.status_code, messages.get(error.status_code, str(error.detail)), code=code)
    response = refusal(request.scope, refused)
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(sorted(_methods(request)))
    return response


def _methods(request: Request) -> set[str]:
    """What is allowed at a path. Each method has a route of its own here, and a route knows only its own."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    path = next((route.path for route in routes if route.path_regex.match(request.url.path)), None)
    return {method for route in routes if route.path == path for method in route.methods or ()}

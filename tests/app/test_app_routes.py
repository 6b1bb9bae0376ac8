"""The routes of Gradio's app: all are listed here, and the guard opens only those of the page."""

import re
from typing import Any

import gradio
from fastapi.routing import iter_route_contexts
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from app import page
from app.catalog import Catalog
from app.guard import add_guards
from tests.app.visitor import LOCAL

# Gradio's routes that the page needs
PAGE_ROUTES = {
    "GET /",
    "HEAD /",
    "GET /assets/{path:path}",
    "GET /config",
    "GET /favicon.ico",
    "GET /gradio_api/app_id",
    "GET /gradio_api/heartbeat/{session_hash}",
    "GET /gradio_api/queue/data",
    "GET /manifest.json",
    "GET /robots.txt",
    "GET /static/{path:path}",
    "GET /theme.css",
    "POST /gradio_api/queue/join",
}
# All other routes. Of /gradio_api/run/{api_name}, the guard opens only "predict".
CLOSED_ROUTES = {
    "GET /config/",
    "GET /gradio_api/app_id/",
    "GET /gradio_api/call/v2/{api_name}/{event_id}",
    "GET /gradio_api/call/{api_name}/{event_id}",
    "GET /gradio_api/custom_component/{id}/{environment}/{type}/{file_name}",
    "GET /gradio_api/deep_link",
    "GET /gradio_api/dev/reload",
    "GET /gradio_api/file/{path:path}",
    "GET /gradio_api/file={path_or_url:path}",
    "GET /gradio_api/info",
    "GET /gradio_api/info/",
    "GET /gradio_api/login_check",
    "GET /gradio_api/login_check/",
    "GET /gradio_api/openapi.json",
    "GET /gradio_api/proxy={url_path:path}",
    "GET /gradio_api/queue/status",
    "GET /gradio_api/runs",
    "GET /gradio_api/runs/",
    "GET /gradio_api/startup-events",
    "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file",
    "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",
    "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}",
    "GET /gradio_api/theme.css",
    "GET /gradio_api/token",
    "GET /gradio_api/token/",
    "GET /gradio_api/upload_progress",
    "GET /gradio_api/user",
    "GET /gradio_api/user/",
    "GET /gradio_api/vibe-code",
    "GET /gradio_api/vibe-code/",
    "GET /logout",
    "GET /monitoring",
    "GET /monitoring/summary",
    "GET /monitoring/{key}",
    "GET /openapi.json",
    "GET /pwa_icon",
    "GET /pwa_icon/{size}",
    "GET /svelte/{path:path}",
    "HEAD /gradio_api/file={path_or_url:path}",
    "HEAD /gradio_api/proxy={url_path:path}",
    "HEAD /openapi.json",
    "POST /gradio_api/api/{api_name}",
    "POST /gradio_api/api/{api_name}/",
    "POST /gradio_api/call/v2/{api_name}",
    "POST /gradio_api/call/v2/{api_name}/",
    "POST /gradio_api/call/{api_name}",
    "POST /gradio_api/call/{api_name}/",
    "POST /gradio_api/cancel",
    "POST /gradio_api/component_server",
    "POST /gradio_api/component_server/",
    "POST /gradio_api/process_recording",
    "POST /gradio_api/reset",
    "POST /gradio_api/reset/",
    "POST /gradio_api/run/{api_name}",
    "POST /gradio_api/run/{api_name}/",
    "POST /gradio_api/stream/{event_id}",
    "POST /gradio_api/stream/{event_id}/close",
    "POST /gradio_api/undo-vibe-edit",
    "POST /gradio_api/undo-vibe-edit/",
    "POST /gradio_api/upload",
    "POST /gradio_api/vibe-code",
    "POST /gradio_api/vibe-code/",
    "POST /gradio_api/vibe-edit",
    "POST /gradio_api/vibe-edit/",
    "POST /gradio_api/vibe-starter-queries",
    "POST /gradio_api/vibe-starter-queries/",
    "POST /login",
    "POST /login/",
}


def test_each_route_of_gradio_is_listed_and_only_those_of_the_page_are_open(tmp_path):
    mount: Any = page.build_app(page.build(Catalog(tmp_path))).routes[-1]
    routes = set()
    for route in iter_route_contexts(mount.app.routes):
        # A route without methods is a WebSocket route.
        routes |= {f"{method} {route.path}" for method in route.methods or {"WEBSOCKET"}}
    new_routes = sorted(routes - PAGE_ROUTES - CLOSED_ROUTES)
    assert not new_routes, (
        f"Gradio {gradio.__version__} has new routes: add those that the page needs to PAGE_ROUTES"
        " and app/guard.py, and the others to CLOSED_ROUTES"
    )
    assert routes >= PAGE_ROUTES
    client = TestClient(add_guards(PlainTextResponse("here"), [1], LOCAL, public=False))
    for route in PAGE_ROUTES | CLOSED_ROUTES:
        method, path = route.split()
        answer = client.request(
            method, re.sub("{.*?}", "x", path), json={"fn_index": 1}, headers={"Host": "localhost"}
        )
        assert answer.status_code == (200 if route in PAGE_ROUTES else 403), route

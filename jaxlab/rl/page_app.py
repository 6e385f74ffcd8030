"""What the web page of a run answers; see `jaxlab.rl.page`."""

import asyncio
import functools
import hmac
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.rl.config import RLRun
from jaxlab.rl.envs.api import parse_action

STATIC = Path(__file__).with_name("static")
EPISODES = 200
"""stored episodes that are listed"""
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class App:
    """The routes.

    Args:
        site: the `jaxlab.rl.page.Site` that it shows.
    """

    def __init__(self, site: Any) -> None:
        self.site = site

    def build(self) -> Any:
        """The Starlette application."""
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route

        routes = [
            Route("/", self._home),
            Route("/static/{name}", self._static),
            Route("/events", self._events),
            Route("/frame/{host}/{slot}", self._frame),
            Route("/episodes", self._episodes),
            Route("/episode/{kind}/{id:int}", self._episode),
            Route("/episode/{kind}/{id:int}/{t:int}", self._picture),
            Route("/wish", self._wish, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(
                    TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]
                ),
                Middleware(_Guard, token=self.site.token),
            ],
        )

    async def _home(self, request: Any) -> Any:
        from starlette.responses import FileResponse, RedirectResponse

        if "token" in request.query_params:  # out of the address, into the cookie
            answer = RedirectResponse("/", 303)
            name = f"jaxlab-{self.site.port}"
            answer.set_cookie(name, self.site.token, httponly=True, samesite="strict")
            return answer
        return FileResponse(STATIC / "page.html", media_type="text/html")

    async def _static(self, request: Any) -> Any:
        from starlette.responses import FileResponse, Response

        name = request.path_params["name"]
        if name not in _FILES:
            return Response(status_code=404)
        return FileResponse(STATIC / name, media_type=_FILES[name])

    async def _events(self, request: Any) -> Any:
        from starlette.responses import StreamingResponse

        async def stream() -> AsyncIterator[str]:
            last = ""
            while not await request.is_disconnected():
                shown = self.site.shown
                slots = {
                    name: {**view._asdict(), "image": view.image is not None}
                    for name, view in shown.slots.items()
                }
                body = {"slots": slots, "tasks": shown.tasks, "figures": shown.figures}
                if not last:
                    body["actions"] = shown.actions
                text = json.dumps(body)
                if text != last and shown.tasks:
                    last = text
                    yield f"data: {text}\n\n"
                await asyncio.sleep(0.2)

        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(
            stream(), headers=headers, media_type="text/event-stream"
        )

    async def _frame(self, request: Any) -> Any:
        from starlette.responses import Response

        name = f"{request.path_params['host']}/{request.path_params['slot']}"
        view = self.site.shown.slots.get(name)
        if view is None or view.image is None:
            return Response(status_code=404)
        return await _png(view.image)

    async def _episodes(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        task = request.query_params.get("task")
        return JSONResponse(await run_in_threadpool(self._list, task))

    async def _episode(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        one = await self._load(request)
        if one is None:
            return JSONResponse({"error": "there is no such episode"}, 404)
        actions = [str(self.site.policy.action(row)) for row in one.tokens]
        return JSONResponse(
            {
                **{
                    name: getattr(one, name)
                    for name in ("task", "seed", "text", "source")
                },
                "reward": one.reward,
                "truncated": one.truncated,
                "actions": actions,
                "versions": one.version.tolist(),
            }
        )

    async def _picture(self, request: Any) -> Any:
        from starlette.responses import Response

        one, t = await self._load(request), request.path_params["t"]
        if one is None or t > one.length:
            return Response(status_code=404)
        return await _png(one.final if t == one.length else one.images[t])

    async def _wish(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        try:
            if int(request.headers.get("content-length", 0)) > 10_000:
                raise ValueError("the request is too large")
            body, site = await request.json(), self.site
            site.wishes.put(read_wish(body, site.run, site.vocabulary))
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": str(error)[:200]}, 400)
        return JSONResponse({})

    async def _load(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool

        kind, number = request.path_params["kind"], request.path_params["id"]
        return await run_in_threadpool(self._read_episode, kind, number)

    def _list(self, task: str | None) -> list[dict[str, Any]]:
        """The newest stored episodes, and the pool."""
        where, values = ("WHERE task = ?", (task,)) if task else ("", ())
        with self._store() as store:
            rows = store.database.query(
                "SELECT 'rollout', rollout, task, seed, reward, steps, 'self', v_max"
                f" FROM trajectory {where} ORDER BY rollout DESC LIMIT {EPISODES}",
                *values,
            )
            rows += store.database.query(
                "SELECT 'pool', id, task, -1, 1.0, steps, source, version"
                f" FROM experience {where} ORDER BY id DESC LIMIT {EPISODES}",
                *values,
            )
        names = ("kind", "id", "task", "seed", "reward", "steps", "source", "version")
        return [dict(zip(names, row, strict=True)) for row in rows]

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a site lives as long as its process)
    def _read_episode(self, kind: str, number: int) -> Any:
        from jaxlab.rl.tables import Member

        table, key = (
            ("experience", "id") if kind == "pool" else ("trajectory", "rollout")
        )
        with self._store() as store:
            found = store.database.query(
                f"SELECT path, sha256 FROM {table} WHERE {key} = ?", number
            )
            if not found or not found[0][0]:
                return None
            try:
                return store.load(Member(number, 0.0, 0, *found[0]))
            except FileNotFoundError:
                return None

    def _store(self) -> Any:
        from jaxlab.rl.store import Store

        return Store(self.site.run.out, self.site.run.store)


def read_wish(body: Any, run: RLRun, vocabulary: tuple[str, ...]) -> dict[str, Any]:
    """What a visitor asks for, checked.

    Raises:
        KeyError, TypeError, ValueError: nothing that may be asked for.
    """
    if not isinstance(body, dict):
        raise ValueError("give an object")
    kind = body.get("do")
    if kind == "pause":
        task, paused = body.get("task"), body.get("paused")
        if task not in run.envs.tasks or not isinstance(paused, bool):
            raise ValueError(f"no task {task!r} in this run")
        return {"do": "pause", "task": task, "paused": paused}
    if kind not in ("take", "release", "act") or not isinstance(body.get("slot"), str):
        raise ValueError("give do, of pause, take, release and act, and a slot")
    wish = {"do": kind, "slot": body["slot"]}
    if kind == "act":
        action, _ = parse_action(body["action"], len(vocabulary))
        wish |= {name: int(body[name]) for name in ("rollout", "t")}
        wish["action"] = action
    return wish


class _Guard:
    """Lets in who has the token, and adds what keeps other sites out."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return
        asked = HTTPConnection(scope)
        given = [
            value for name, value in asked.cookies.items() if name.startswith("jaxlab-")
        ]
        given.append(asked.headers.get("authorization", "").removeprefix("Bearer "))
        if scope["path"] == "/":
            given.append(asked.query_params.get("token", ""))
        known = any(
            hmac.compare_digest(one.encode(), self.token.encode()) for one in given
        )
        origin = asked.headers.get("origin")
        if not known or origin not in (None, f"http://{asked.headers.get('host')}"):
            refused = PlainTextResponse(
                "open the address that the run has printed\n", 403
            )
            await refused(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ]
            await send(message)

        await self.app(scope, receive, sent)


async def _png(image: np.ndarray) -> Any:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    def encode() -> bytes:
        from PIL import Image

        data = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(data, "PNG", compress_level=1)
        return data.getvalue()

    headers = {"Cache-Control": "no-store"}
    return Response(
        await run_in_threadpool(encode), headers=headers, media_type="image/png"
    )

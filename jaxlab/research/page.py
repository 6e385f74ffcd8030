"""The web page of a study: its agents, runs' curves, paper, and a message box.

It reads the workspace and writes the inbox, as the command line does, so it may run
beside the driver, before it or after it. It listens on loopback and wants its token;
what it shows is text from models and logs, so nothing of it is ever markup.
"""

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jaxlab.errors import ConfigError, UserError
from jaxlab.research import human, study
from jaxlab.research.journal import JournalError, read_journal
from jaxlab.research.state import fold
from jaxlab.research.types import ToolError
from jaxlab.research.workspace import Workspace

if TYPE_CHECKING:
    from starlette.applications import Starlette

POINTS = 200
"""of a curve at most"""
PERIOD = 0.5
"""seconds between looks at the files"""
PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; base-uri 'none'; "
    "form-action 'none'",
}


def serve(workspace: str, port: int = 0, say: Callable[[str], Any] = print) -> None:
    """Serves the page until interrupted; says its address first.

    Args:
        workspace: folder of the study, which may be begun later.
        port: 0: one that is free.
        say: takes the line with the address.

    Raises:
        ConfigError: the extra is not installed, or the port is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise ConfigError(
            "the web page needs the extra `research`: pip install 'jaxlab[research]'"
        ) from None
    token = secrets.token_urlsafe(24)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise ConfigError(
            f"--port {port}: {error.strerror}; 0 takes a free one"
        ) from None
    with listener:
        listener.listen(64)  # so that the address answers once it is told
        say(f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}")
        config = uvicorn.Config(
            make_app(workspace, token), log_level="warning", timeout_graceful_shutdown=1
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def make_app(workspace: str, token: str) -> "Starlette":
    """The application: page, state, stream of states, paper, messages."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    root = Path(workspace)

    def allowed(request: Request) -> bool:
        given = request.headers.get("x-token") or request.query_params.get("token", "")
        return secrets.compare_digest(given.encode(), token.encode())

    def guarded(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def checked(request: Request) -> Response:
            if not allowed(request):
                return Response("the address with its token is needed", 403)
            response = await handler(request)
            response.headers.update(HEADERS)
            return response

        return checked

    async def page(request: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html")

    async def script(request: Request) -> Response:
        body = PAGE.with_suffix(".js").read_bytes()
        return Response(body, media_type="text/javascript", headers=HEADERS)

    async def state(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(snapshot, root))

    async def stream(request: Request) -> Response:
        async def states() -> AsyncIterator[str]:
            last = None
            while not await request.is_disconnected():
                now = await asyncio.to_thread(snapshot, root)
                shown = json.dumps(now | {"age": None, "usage": None})
                if shown != last:
                    last = shown
                    yield f"data: {json.dumps(now)}\n\n"
                else:
                    yield ": still here\n\n"
                await asyncio.sleep(PERIOD)

        return StreamingResponse(states(), media_type="text/event-stream")

    async def paper(request: Request) -> Response:
        try:
            body = Workspace(root.resolve()).read_bytes("paper/paper.pdf")
        except ToolError as error:
            return Response(str(error), 404)
        return Response(body, media_type="application/pdf")

    async def message(request: Request) -> Response:
        if int(request.headers.get("content-length") or 0) > 4 * human.LONGEST:
            return Response("too long", 413)
        try:
            row = await request.json()
            command, text = row["command"], row.get("text", "")
            target = row.get("target", "")
            texts = (command, text, target)
            if command not in get_args(human.Command) or not all(
                isinstance(t, str) for t in texts
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            return Response("give command, text and target", 400)
        try:
            return JSONResponse(
                {"id": study.say(root, text, command=command, target=target)}
            )
        except UserError as error:
            return Response(str(error), 409)

    return Starlette(
        routes=[
            Route("/", guarded(page)),
            Route("/page.js", script),
            Route("/state", guarded(state)),
            Route("/events", guarded(stream)),
            Route("/paper.pdf", guarded(paper)),
            Route("/message", guarded(message), methods=["POST"]),
        ],
        # a page elsewhere cannot reach this one by a name that points here
        middleware=[
            Middleware(
                TrustedHostMiddleware,
                allowed_hosts=["127.0.0.1", "localhost"],
            )
        ],
    )


def snapshot(root: Path) -> dict[str, Any]:
    """What the page shows, as JSON: status, plan, turns, curves, paper."""
    try:
        told = study.status(root, lines=60)
        events = read_journal(root / "journal.jsonl")
    except JournalError as error:
        return {"state": "edited", "question": str(error)}
    except UserError:
        return {"state": "not begun", "question": f"{root} has no study yet"}
    ws, now = Workspace(root.resolve()), fold(events)
    metric = "eval/loss"
    plan = None
    with contextlib.suppress(ToolError, KeyError, TypeError):
        plan = ws.read_json(f"plans/{(now.plan or {})['n']}.json")
        metric = plan["metric"]
    answers = {e.data["message"]: e.data["decision"] for e in events if e.kind == "ack"}
    pdf = root / "paper/paper.pdf"
    return told | {
        "plan": plan,
        "metric": metric,
        "said": [
            {"id": r.id, "text": r.text, "answer": answers.get(r.id)}
            for r in now.remarks
        ],
        "sessions": [
            {"agent": s.agent, "task": s.task, "status": s.status, "turns": s.turns}
            for s in now.sessions.values()
        ],
        "curves": {
            run: {"status": state, "points": curve(ws, run, metric)}
            for run, state in list(now.runs.items())[-40:]
        },
        "paper": pdf.stat().st_mtime if pdf.is_file() else None,
    }


def curve(ws: Workspace, run: str, metric: str) -> list[list[float]]:
    """(step, value) of a run's metric, `POINTS` at most; what is torn is left out."""
    points = []
    with contextlib.suppress(ToolError):
        for line in ws.read_text(f"runs/{run}/metrics.jsonl").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                value = row.get(metric, row.get("train/loss"))
                if isinstance(value, int | float):
                    points.append([row["step"], value])
    every = max(len(points) // POINTS, 1)
    return points[::every]

"""Serving the page: what a run looks like now, for browsers, programs and Prometheus."""

import hashlib
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from collab.background import Background
from collab.fill_mask import MAX_CHARACTERS, FillMask, Refused
from collab.page import POLICY, render_page
from collab.view import RunView, as_json, as_prometheus

logger = logging.getLogger(__name__)

PERIOD = 5.0
VIEW_SECONDS = 1.0
OTHER_PORTS = 20
CLOSE_SECONDS = 2
MAX_CONNECTIONS = 200
MAX_BODY = 8 * MAX_CHARACTERS  # a character takes up to 6 bytes in JSON, and the rest of the object some more
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageServer(Background):
    """Serves the page in a thread of its own until `stop`, and again if that thread ends.

    If `port` is taken, one of the next ones is; if all are, the run goes on without a page and this tries again.

    :param look: gives the view; called at most once a second, however many people look, from one thread at a time.
    :param tell: called with each address at which the page is, for a person.
    """

    def __init__(
        self, host: str, port: int, look: Callable[[], RunView], fill_mask: FillMask, tell: Callable[[str], None]
    ) -> None:
        super().__init__("Serving the page", PERIOD)
        self.address: str | None = None
        """Where the page is; None while it is not served."""
        self._host, self._port, self._tell = host, port, tell
        self._app = page_app(look, fill_mask, self._note_failure)
        self._server: uvicorn.Server | None = None
        self._serving: threading.Thread | None = None
        self.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Close the page; open connections get `timeout` seconds."""
        super().stop(timeout)
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            self._serving.join(timeout)
            self._server.force_exit = True
        self.address = None

    def _take_a_turn(self) -> None:
        if self._serving is not None and self._serving.is_alive():
            return
        self.address = None
        listener = listen(self._host, self._port)
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._serving = threading.Thread(
            target=self._server.run, args=([listener],), name="Page's connections", daemon=True
        )
        self._serving.start()
        self._port = listener.getsockname()[1]
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self.address = f"http://{shown}:{self._port}"
        self._tell(self.address)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `port`, or on the first free one of the next.

    :raises OSError: none of them is free, or `host` is not this computer's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + OTHER_PORTS, 65535)
    for candidate in range(port, last + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            reason = error
    raise OSError(
        f"No port from {port} to {last} can be opened on {host} ({reason.strerror}): give another --page_port, or 0 "
        f"for no page"
    )


def page_app(look: Callable[[], RunView], fill_mask: FillMask, note_failure: Callable[[Exception], None]) -> Starlette:
    """The page's four addresses: `/`, `/status.json`, `/metrics` and `/fill-mask`.

    :param note_failure: called with what a good question has failed for.
    """
    view = Shared(look)

    def answer(request: Request, make: Callable[[RunView], str], media_type: str) -> Response:
        content = view.rendered(make).encode()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = HEADERS | {"ETag": tag}
        if request.headers.get("if-none-match", "").removeprefix("W/") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    # Plain functions: starlette runs them in worker threads, so that a slow one holds up nobody.
    def page(request: Request) -> Response:
        return answer(request, render_served_page, "text/html")

    def status(request: Request) -> Response:
        return answer(request, as_json, "application/json")

    def metrics(request: Request) -> Response:
        return PlainTextResponse(view.rendered(as_prometheus), headers=HEADERS, media_type="text/plain; version=0.0.4")

    async def fill(request: Request) -> Response:
        def refuse(code: int, reason: str) -> Response:
            return JSONResponse({"error": reason}, code, HEADERS)

        # Another site's page cannot send this type without asking first, which nobody answers.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return refuse(415, "Send JSON: Content-Type: application/json.")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return refuse(413, f"The text is longer than {MAX_CHARACTERS} characters.")
        try:
            text = json.loads(body)["text"]
            if not isinstance(text, str):
                raise TypeError(text)
        except (ValueError, TypeError, KeyError, RecursionError):
            return refuse(400, 'Send {"text": "one [MASK] in a sentence"}.')
        try:
            found = await run_in_threadpool(fill_mask.answer, text)
        except Refused as refused:
            if refused.__cause__ is not None:
                note_failure(refused)
            return refuse(refused.status, str(refused))
        guesses = [{"word": guess.word, "probability": guess.probability} for guess in found.guesses]
        return JSONResponse({"global_step": found.step, "guesses": guesses}, headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/status.json", status),
            Route("/metrics", metrics),
            Route("/fill-mask", fill, methods=["POST"]),
        ],
        middleware=[Middleware(GZipMiddleware, minimum_size=1000)],
    )


def render_served_page(run: RunView) -> str:
    return render_page(run, served=True)


class Shared:
    """One view, and one rendering of it, for all who ask within a second."""

    def __init__(self, look: Callable[[], RunView]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._view: RunView | None = None
        self._rendered: dict[Callable[[RunView], str], str] = {}

    def rendered(self, make: Callable[[RunView], str]) -> str:
        with self._lock:
            if self._view is None or time.monotonic() - self._looked >= VIEW_SECONDS:
                self._view, self._rendered = self._look(), {}
                self._looked = time.monotonic()
            if make not in self._rendered:
                self._rendered[make] = make(self._view)
            return self._rendered[make]

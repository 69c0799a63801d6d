"""The server of the page: its files, a socket for each client, and one address for single pictures.

    server_of(application(Artist(Translator.bundled()))).run(sockets=[listener])

    GET  /            encoder/live/page/
    WS   /socket      the messages of `encoder.live.artist`; of a client's frames the newest counts
    POST /drawing     a picture file as the body -> the drawing as PNG; settings in the query

Refused with a sentence: 400 a setting that is none, 403 see `encoder.live.guard`, 408 too slow, 413
too large, 415 no picture, 422 no face, 429 busy. A socket is closed with a reason: 1003 for text,
1008 for too many frames, 1009 for a message that is too large, 1013 where all places are taken. A
picture that is no good is answered with an error, and the connection goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from encoder.live import PAGE
from encoder.live.artist import (
    MOST_BYTES,
    MOST_HEADER,
    Artist,
    Refused,
    Sitter,
    error_answer,
    unpack,
)
from encoder.live.guard import Guard
from encoder.live.turns import Turns

RATE, BURST = 90.0, 180.0  # messages a second of one client; what it may be ahead
PATIENCE = 30.0  # seconds for a single picture to come
POSTS = 10.0  # single pictures a second, of all clients together
MISUSE, FULL, TEXT, FAULT = 1008, 1013, 1003, 1011  # WebSocket close codes
STATUS = {"too-large": 413, "bad-picture": 415, "no-face": 422}  # of a Refused; others: 400


def server_of(app: FastAPI) -> uvicorn.Server:
    """It ends at Ctrl-C or SIGTERM, which it passes on when all is closed."""
    options = uvicorn.Config(
        app,
        ws_max_size=MOST_BYTES + MOST_HEADER,
        ws_max_queue=2,
        ws_per_message_deflate=False,  # pictures do not get smaller
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(options)


class Rate:
    """So many a second, and so many at once after a pause: a bucket of tokens."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.left, self.last = burst, time.monotonic()

    def allows(self) -> bool:
        now = time.monotonic()
        self.left = min(self.burst, self.left + self.rate * (now - self.last))
        self.last = now
        self.left -= 1
        return self.left >= 0


def application(
    artist: Artist,
    *,
    token: str | None = None,  # that others must have, see `encoder.live.guard`
    clients: int = 32,  # at the same time
) -> FastAPI:
    """The ASGI application: the page, /socket and /drawing."""
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.turns = Turns()
        yield
        await asyncio.to_thread(app.state.turns.close)

    # without its pages of documentation, which load scripts from elsewhere
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, token=token)
    connected: set[Any] = set()

    @app.websocket("/socket")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        if len(connected) >= clients:
            return await socket.close(FULL, f"All {clients} places at this server are taken.")
        connected.add(socket)
        try:
            with suppress(WebSocketDisconnect):
                await Client(socket, artist, app.state.turns).serve()
        finally:
            connected.discard(socket)

    rate, drawing = Rate(POSTS, POSTS), set[Any]()

    @app.post("/drawing")
    async def draw(request: Request) -> Response:
        return await post(request, artist, app.state.turns, rate, drawing, clients)

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


class Client:
    """One socket. Of the frames that come while one is drawn the newest is drawn next; the others
    get no answer, and an answer to a later frame says so."""

    def __init__(self, socket: WebSocket, artist: Artist, turns: Any) -> None:
        self.socket, self.artist, self.turns = socket, artist, turns
        self.sitter = Sitter(artist)
        self.newest: bytes | None = None
        self.came = asyncio.Event()
        self.gone = False

    async def serve(self) -> None:
        """Until it leaves, or breaks a rule."""
        await self.socket.send_bytes(self.artist.greeting)
        answering = asyncio.create_task(self.answer())
        receiving = asyncio.create_task(self.receive())
        done, waiting = await asyncio.wait(
            (answering, receiving), return_when=asyncio.FIRST_COMPLETED
        )
        self.gone = True  # ends a refinement that is under way
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        for task in done:
            task.result()

    async def receive(self) -> None:
        rate = Rate(RATE, BURST)
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if not rate.allows():
                return await self.socket.close(MISUSE, f"More than {RATE:.0f} frames a second.")
            if message.get("bytes") is None:
                return await self.socket.close(TEXT, "Frames are binary messages.")
            self.newest = message["bytes"]
            self.came.set()

    async def answer(self) -> None:
        while True:
            await self.came.wait()
            self.came.clear()
            message, self.newest = self.newest, None
            assert message is not None
            number = 0
            try:
                number = _number(unpack(message)[0])
                settings, picture = self.artist.read(message)
                future = self.turns.ask(
                    self.sitter.draw, settings, picture, self.give_way, brief=not settings.refine
                )
                answer = await asyncio.wrap_future(future)
            except Refused as error:
                answer = error_answer(number, error)
            except Exception:
                logging.getLogger(__name__).exception("A frame could not be drawn.")
                return await self.socket.close(FAULT, "A fault of the server; its console has it.")
            with suppress(RuntimeError):  # it has left meanwhile
                await self.socket.send_bytes(answer)

    def give_way(self) -> None:
        """Between two steps of a refinement, in the worker's thread."""
        if self.gone:
            raise Refused("gone", "The client has left.")
        self.turns.give_way()


def _number(header: dict[str, Any]) -> int:
    """Of the request, as far as it has one: the settings are checked later."""
    number = header.get("id")
    return number if type(number) is int else 0


async def post(
    request: Request, artist: Artist, turns: Any, rate: Rate, drawing: set[Any], most: int
) -> Response:
    """A picture file as the body -> the drawing as PNG; settings in the query."""

    def refusal(status: int, code: str, sentence: str, **headers: str) -> Response:
        return JSONResponse({"code": code, "message": sentence}, status, headers)

    if len(drawing) >= most or not rate.allows():
        sentence = "The server is busy; try again in a second."
        return refusal(429, "busy", sentence, **{"Retry-After": "1"})
    drawing.add(request)
    try:
        body = await asyncio.wait_for(body_of(request), PATIENCE)
        given = {name: _json(value) for name, value in request.query_params.items()}
        settings = artist.settings({"still": True, **given})
        future = turns.ask(
            Sitter(artist).draw, settings, body, turns.give_way, brief=not settings.refine
        )
        header, pictures = unpack(await asyncio.wrap_future(future))
        part = header["parts"][0]
        return Response(pictures[: part["bytes"]], media_type=part["type"])
    except Refused as error:
        return refusal(STATUS.get(error.code, 400), error.code, str(error))
    except asyncio.TimeoutError:
        return refusal(408, "too-slow", f"The picture did not come within {PATIENCE:.0f} seconds.")
    finally:
        drawing.discard(request)


async def body_of(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refused("too-large", f"The picture has more than {MOST_BYTES >> 20} MiB.")
    return bytes(body)


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value

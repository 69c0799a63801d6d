"""Who may ask the server of `encoder.live`, checked before anything else looks at a request.

    app = Guard(app, token=None)               # bound to this machine: only its own names
    app = Guard(app, token="…")                # bound to another address: only who has the token

A browser sends what any page asks it to, also to servers on the same machine. So without a token
the Host must be a name of this machine (against DNS rebinding), and in both cases an Origin must be
this server's own (against sockets and requests from other sites). With a token the first visit
brings it, http://host:port/?token=…, and gets a cookie for it that scripts cannot read; programs
send `Authorization: Bearer …`. All answers carry headers that keep other sites and addresses out.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HERE = ("localhost", "127.0.0.1", "[::1]")
COOKIE = "share-token"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob:",
    "media-src": "'self' blob:",
    "connect-src": "'self'",
    "worker-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Guard:
    """ASGI middleware. What it refuses is answered 403 with a sentence; a socket is not opened."""

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self.answer(scope)
        if answer is None:
            return await self.app(scope, receive, sealed)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})  # unopened: it reads 403
        return await answer(scope, receive, sealed)

    def answer(self, scope: Scope) -> Response | None:
        """To a request that goes no further; None: it may."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token is None and host.rsplit(":", 1)[0] not in HERE and host not in HERE:
            return _refusal("This server answers to localhost only; open http://localhost.")
        secure = scope["scheme"] in ("https", "wss")
        if origin is not None and origin != f"{'https' if secure else 'http'}://{host}":
            return _refusal("This request comes from another site; open the server's own page.")
        if self.token is None:
            return None
        brought = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["type"] == "http" and scope["method"] == "GET" and self.fits(brought):
            answer = RedirectResponse("/", 303)  # so that no history keeps it
            answer.set_cookie(COOKIE, brought, httponly=True, samesite="strict", secure=secure)
            return answer
        kind, _, credentials = headers.get("authorization", "").partition(" ")
        bearer = credentials.strip() if kind.lower() == "bearer" else ""
        if self.fits(bearer) or self.fits(_cookie(headers)):
            return None
        return _refusal("The share token is missing or wrong; open the link that was printed.")

    def fits(self, token: str) -> bool:
        wanted = self.token or ""
        return bool(wanted) and hmac.compare_digest(token.encode(), wanted.encode())


def _cookie(headers: Headers) -> str:
    try:
        morsel: Any = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _refusal(sentence: str) -> Response:
    return PlainTextResponse(sentence, 403)

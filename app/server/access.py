"""Access by token: before Streamlit sees a request of any kind, the request has to prove that it knows the token."""

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from html import escape
from typing import Any
from urllib.parse import parse_qsl, urlencode

from reasonscope.data.errors import InputError

VARIABLE = "REASONSCOPE_APP_TOKEN"
_REFUSED = b"Open the link with the token that the app said when it was started.\n"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class Guard:
    """An ASGI app that passes requests with this start's cookie on to `app`; the link with the token sets the cookie;
    everything else gets 403.

    The cookie is drawn at every start, and no script of a page and no page of another site can read it. Raises
    InputError for an empty token.
    """

    def __init__(self, app: _App, token: str) -> None:
        if not token:
            raise InputError(f"the app needs a token, but {VARIABLE} is not set")
        self._app = app
        self._token = token
        # Browsers send a cookie to every port of a host, where another app may run, so the cookie's name is unique.
        self._cookie = f"reasonscope_{secrets.token_hex(4)}={secrets.token_urlsafe(32)}"

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and _same(_query(scope).get("token", ""), self._token):
            await self._welcome(scope, send)
        elif scope["type"] == "lifespan" or self._bears_cookie(scope):
            await self._app(scope, receive, send)
        else:
            await _answer(scope, send, 403, "text/plain", _REFUSED)

    def _bears_cookie(self, scope: _Message) -> bool:
        sent = [value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie"]
        return any(_same(one.strip(), self._cookie) for one in ";".join(sent).split(";"))

    async def _welcome(self, scope: _Message, send: _Send) -> None:
        """Set the cookie, and continue to the same page without the token, so that a copied link does not contain it.

        Uses a page and not a redirect: after a link on another site, a redirect would arrive without a strict cookie.
        """
        rest = urlencode([(key, value) for key, value in _query(scope).items() if key != "token"])
        page = f'<!doctype html><meta http-equiv="refresh" content="0;url=?{escape(rest)}">'
        cookie = f"{self._cookie}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(scope, send, 200, "text/html", page.encode(), (b"set-cookie", cookie.encode()))


def _query(scope: _Message) -> dict[str, str]:
    return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())


async def _answer(
    scope: _Message, send: _Send, status: int, kind: str, body: bytes, *headers: tuple[bytes, bytes]
) -> None:
    """A complete answer, after which the connection ends: an unread request body is not waited for."""
    prefix = "websocket.http" if scope["type"] == "websocket" else "http"
    about = {
        b"content-type": f"{kind}; charset=utf-8".encode(),
        b"content-length": str(len(body)).encode(),
        b"cache-control": b"no-store",
        b"referrer-policy": b"no-referrer",
        b"connection": b"close",
    }
    await send({"type": f"{prefix}.response.start", "status": status, "headers": [*about.items(), *headers]})
    await send({"type": f"{prefix}.response.body", "body": body})

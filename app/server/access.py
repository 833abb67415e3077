"""Who is answered where a token is asked for: before Streamlit sees a request, of whatever kind, it has to show that it knows the token."""

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
    """An ASGI app that hands on to `app` what bears the cookie of this start; the link with the token gets the cookie, all else 403.

    The cookie is drawn anew at every start, and no script of a page and no page of another site gets at it. Raises InputError for an
    empty token.
    """

    def __init__(self, app: _App, token: str) -> None:
        if not token:
            raise InputError(f"the app asks for a token, and there is none; set {VARIABLE}")
        self._app = app
        self._token = token
        # Browsers send a cookie to every port of a host, and on another there may be another app: a name of its own.
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
        """The cookie, and on to the same page without the token, so that a link copied there does not hand it on.

        By a page and not by a redirect: where a link of another site was followed, a redirect would come without a strict cookie.
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
    """A whole answer behind which the connection ends: what more was sent, a body that was not asked for, is not waited for."""
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

"""A page of another site, paths that lead out, and readers without the token: what a running app answers to them, over the wire."""

import base64
import http.client
import os
import re
import time
from contextlib import closing, contextmanager, suppress
from urllib.parse import urlsplit

import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from reasonscope.app.server.serving import serving

SECRET = "the words of another folder"
TOKEN = "a token; ä&b"
LINK = "token=a+token%3B+%C3%A4%26b"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text(SECRET, encoding="utf-8")
    (folder / "runs").mkdir()
    with serving(folder / "runs") as url:
        yield urlsplit(url).netloc


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("guarded"), token=TOKEN) as url:
        yield urlsplit(url).netloc


def asked(address, path, *, method="GET", headers=None, body=None):
    """Status and body of one request, whose path goes out as it is written here."""
    status, content, _ = answered(address, path, method=method, headers=headers, body=body)
    return status, content


def answered(address, path, *, method="GET", headers=None, body=None):
    """The same, and the headers of the answer."""
    with closing(http.client.HTTPConnection(address, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": address, "Content-Length": str(len(body or b"")), **(headers or {})}.items():
            connection.putheader(name, value)
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever is refused is answered before the body is read
            connection.endheaders(body)
        with connection.getresponse() as answer:
            return answer.status, b"" if answer.status == 101 else answer.read(), answer.headers


def opened(address, *, origin, host=None, cookie="", query=""):
    """The status that a browser's page of `origin` gets when it asks for the stream of the app."""
    headers = {
        "Cookie": cookie,
        "Host": host or address,
        "Origin": origin,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
    }
    return asked(address, f"/_stcore/stream{query}", headers=headers)[0]


def multipart(content):
    """A file as a form sends it: the headers, and the body."""
    begin = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f.jsonl"\r\n\r\n'
    return {"Content-Type": "multipart/form-data; boundary=x"}, begin + content + b"\r\n--x--\r\n"


def cookie_of(address):
    """The cookie that the link with the token gives, as a browser sends it."""
    return answered(address, f"/?{LINK}")[2]["Set-Cookie"].partition(";")[0]


@contextmanager
def session(address, cookie):
    """A reader's session: its stream, and a function that puts a file into it, with these headers changed."""
    _, _, headers = answered(address, "/_stcore/health", headers={"Cookie": cookie})
    xsrf = headers["Set-Cookie"].partition(";")[0]
    with connect(f"ws://{address}/_stcore/stream", additional_headers={"Cookie": cookie}, max_size=None) as socket:
        run = rerun(socket, BackMsg(rerun_script={}))
        (id,) = (came.new_session.initialize.session_id for came in run if came.HasField("new_session"))

        def put(content, **changed):
            about, body = multipart(content)
            headers = {**about, "Cookie": f"{cookie}; {xsrf}", "X-Xsrftoken": xsrf.partition("=")[2], **changed}
            return asked(address, f"/_stcore/upload_file/{id}/file", method="PUT", headers=headers, body=body)[0]

        yield socket, put, run


def rerun(socket, message):
    """What comes of a message until the script that it starts has ended."""
    socket.send(message.SerializeToString())
    came = []
    while not (came and came[-1].HasField("script_finished")):
        came.append(ForwardMsg.FromString(socket.recv(timeout=60)))
    return came


def test_a_page_of_another_site_gets_no_stream(address):
    assert opened(address, origin=f"http://{address}") == 101
    assert opened(address, origin="http://evil.example") in (400, 403)


def test_a_foreign_name_that_points_here_gets_no_stream(address):
    """The empty page is Streamlit's own and the same for everybody; whatever it shows comes by the stream."""
    assert opened(address, origin="http://evil.example", host="evil.example") in (400, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/static/../../secret.txt",
        "/static/%2e%2e/%2e%2e/secret.txt",
        "/app/static/..%2f..%2fsecret.txt",
        "/media/..%2f..%2fsecret.txt",
        "/component/x/../../../secret.txt",
        "/_stcore/../../../../../../etc/passwd",
        "//etc/passwd",
    ],
)
def test_no_path_leads_to_a_file_outside(address, path):
    _, body = asked(address, path)
    assert SECRET.encode() not in body and b"root:" not in body


def test_an_upload_without_the_token_of_the_page_is_refused(address):
    headers, body = multipart(b"{}")
    headers |= {"Origin": "http://evil.example"}
    status, _ = asked(address, "/_stcore/upload_file/session/file", method="PUT", headers=headers, body=body)
    assert status in (400, 403)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/", "/trace", "/?token=", "/?token=wrong", f"/?{LINK}x", "//", "/static/js/index.js", "/_stcore/health",
        "/_stcore/metrics", "/_stcore/host-config", "/_stcore/stream", "/_stcore/upload_file/a/b", "/media/a", "/favicon.png",
        "/_stcore/agent/openapi.json",
    ],
)  # fmt: skip
def test_without_the_token_nothing_is_answered(guarded, path, method):
    status, body, headers = answered(guarded, path, method=method)
    assert status == 403
    assert b"link with the token" in body or (method == "HEAD" and body == b"")
    assert "Set-Cookie" not in headers


def test_the_link_with_the_token_gives_a_cookie_that_no_script_and_no_other_site_has(guarded):
    status, body, headers = answered(guarded, f"/trace?run=a%26b&{LINK}&q=%22%3E")
    assert status == 200
    assert b'url=?run=a%26b&amp;q=%22%3E"' in body and b"token" not in body
    cookie, *flags = headers["Set-Cookie"].split("; ")
    assert set(flags) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert asked(guarded, "/", headers={"Cookie": cookie})[0] == 200
    assert asked(guarded, "/_stcore/health", headers={"Cookie": f"a=b; {cookie}; c"})[0] == 200
    assert b"token" not in answered(guarded, f"/?{LINK}", headers={"Cookie": cookie})[1]


def test_the_token_opens_by_the_link_alone(guarded):
    assert asked(guarded, f"/?{LINK}", method="POST")[0] == 403
    assert opened(guarded, origin=f"http://{guarded}", query=f"?{LINK}") == 403


@pytest.mark.parametrize(
    "cookie",
    ["", "{name}=", "{name}=wrong", "{name}={token}", "{name}={value}x", "other={value}", "{name}=ä", "=;;{"],
)
def test_a_wrong_cookie_opens_neither_pages_nor_the_stream(guarded, cookie):
    name, _, value = cookie_of(guarded).partition("=")
    wrong = re.sub(r"{(\w+)}", lambda match: {"name": name, "value": value, "token": TOKEN}[match[1]], cookie)
    sent = wrong.encode("utf-8").decode("latin-1")
    assert asked(guarded, "/_stcore/health", headers={"Cookie": sent})[0] == 403
    assert opened(guarded, origin=f"http://{guarded}", cookie=sent) == 403


def test_a_cookie_ends_with_the_start_that_gave_it(guarded, tmp_path):
    with serving(tmp_path, token=TOKEN) as url:
        later = urlsplit(url).netloc
        mine = cookie_of(later)
        old = f"{mine.partition('=')[0]}={cookie_of(guarded).partition('=')[2]}"
        assert [asked(later, "/", headers={"Cookie": cookie})[0] for cookie in (mine, old)] == [200, 403]


def test_a_file_is_taken_with_the_cookie_alone(guarded):
    wrong = f"{cookie_of(guarded)}x"
    with session(guarded, cookie_of(guarded)) as (_, put, _):
        assert put(bytes(2**21)) == 204
        assert put(b"", Cookie=wrong) == 403
        # The server hangs up while a long one is still sent, so that its answer can be lost on the way.
        with suppress(ConnectionResetError, http.client.IncompleteRead):
            assert put(bytes(2**21), Cookie=wrong) == 403
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://{guarded}/_stcore/stream", origin=f"http://{guarded}")


@contextmanager
def uploaded(url, folder, cookie=""):
    """A session whose upload became a run in `folder`."""
    with session(urlsplit(url).netloc, cookie) as (socket, put, run):
        assert put(b'{"prompt": "a?", "completion": "2"}') == 204
        elements = [came.delta.new_element for came in run if came.HasField("delta")]
        (field,) = (one.file_uploader.id for one in elements if one.HasField("file_uploader"))
        given = {"file_id": "file", "name": "mine.jsonl", "size": 36, "file_urls": {"file_id": "file"}}
        state = {"id": field, "file_uploader_state_value": {"uploaded_file_info": [given]}}
        rerun(socket, BackMsg(rerun_script={"widget_states": {"widgets": [state]}}))
        assert [path.name for path in folder.glob("reasonscope-upload-*/*")] == ["uploaded"]
        yield


@pytest.mark.parametrize("token", ["", TOKEN])
def test_what_was_uploaded_goes_with_the_server(token, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving(tmp_path, token=token) as url:
        with uploaded(url, tmp_path, cookie_of(urlsplit(url).netloc) if token else ""):
            pass
        assert [*tmp_path.glob("reasonscope-upload-*")]
    assert [*tmp_path.glob("reasonscope-upload-*")] == []


def test_what_was_uploaded_goes_with_its_session(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("STREAMLIT_SERVER_DISCONNECTED_SESSION_TTL", "1")
    with serving(tmp_path) as url:
        with uploaded(url, tmp_path):
            pass
        until = time.monotonic() + 60
        while [*tmp_path.glob("reasonscope-upload-*")] and time.monotonic() < until:
            time.sleep(1)
            with session(urlsplit(url).netloc, ""):  # Streamlit looks for sessions that are over when one comes or goes
                pass
        assert [*tmp_path.glob("reasonscope-upload-*")] == []

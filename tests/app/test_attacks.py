"""A page of another site, and paths that lead out: what a running app answers to them, over the wire."""

import base64
import http.client
import os
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from reasonscope.app.serving import serving

SECRET = "the words of another folder"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text(SECRET, encoding="utf-8")
    (folder / "runs").mkdir()
    with serving(folder / "runs") as url:
        yield urlsplit(url).netloc


def asked(address, path, *, method="GET", headers=None, body=None):
    """Status and body of one request, whose path goes out as it is written here."""
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": address, "Content-Length": str(len(body or b"")), **(headers or {})}.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    with closing(connection), connection.getresponse() as answer:
        return answer.status, b"" if answer.status == 101 else answer.read()


def opened(address, *, origin, host=None):
    """The status that a browser's page of `origin` gets when it asks for the stream of the app."""
    headers = {
        "Host": host or address,
        "Origin": origin,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
    }
    return asked(address, "/_stcore/stream", headers=headers)[0]


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
    boundary = "x"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n{{}}\r\n--{boundary}--\r\n'.encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Origin": "http://evil.example"}
    status, _ = asked(address, "/_stcore/upload_file/session/file", method="PUT", headers=headers, body=body)
    assert status in (400, 403)

"""Where code may be sent: to this machine, or to an address that the user trusts."""

import ipaddress
from urllib.parse import urlsplit

from reasonscope.data.errors import InputError


def check_address(url: str, *, trusted: bool = False) -> None:
    """Raise InputError for an address of another machine that is not trusted, since whoever answers there is sent code to run.

    vLLM with vllm-lens runs the hooks of everybody who reaches it, so an open port is an open door whatever this check says.
    """
    host = urlsplit(url).hostname or ""
    if trusted or host == "localhost" or _is_loopback(host):
        return
    raise InputError(
        f"this travels as code (a recipe that depends on tokens, a monitor, statistics of attention), which {host or url!r} would run; "
        "forward its port to this machine "
        "(ssh -L 8000:localhost:8000), or add --trust-server if the server and the network between are yours"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Whether the Hugging Face hub can be asked, found out in seconds: its client's own retries take minutes."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request

CONNECT_SECONDS = 5.0


def hub_reachable() -> bool:
    """Whether the hub's name can be looked up and a connection opened; behind a proxy, which does both, it is assumed.

    With HF_HUB_OFFLINE set, it is not reachable.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False

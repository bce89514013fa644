"""What talking to a server needs: messages without secrets, proxies, and the hub's address, token and words."""

import datetime
import email.utils
import logging
import os
import re
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from scripts.common.errors import KilnError


def clean(text: object) -> str:
    """`text` without what opens doors: the token, passwords in urls, and signed queries."""
    text = str(text)
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"(\w+://)[^\s/@'\"]+@", r"\1***@", text)
    return re.sub(r"((?:https?://|\burl: /)[^\s?'\"]*)\?[^\s'\"]*", r"\1?***", text)


class CleanFilter(logging.Filter):
    """Cleans what a library logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = clean(record.getMessage()), ()
        return True


def reason(error: BaseException) -> str:
    """What an error of a library says, on one line and without secrets."""
    return clean(error).strip().replace("\n", " ")[:300] or type(error).__name__


def proxy_in_force(url: str) -> str:
    """In words, the proxy that requests to `url` go through."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return "no proxy is set"
    if parts.hostname and urllib.request.proxy_bypass(parts.hostname):
        return f"the proxy {clean(proxy)} is bypassed by NO_PROXY"
    return f"through the proxy {clean(proxy)}"


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a server asks to wait by Retry-After (RFC 9110, 10.2.3: seconds or a date); 0 if it does not."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())


# --- the Hugging Face hub ---


def hub_token() -> str | None:
    """HF_TOKEN; None if it is not set.

    Raises:
        KilnError: it holds what no token holds. Libraries would show it in the errors that they make of that.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise KilnError(
            "HF_TOKEN holds a space, a line break or a letter that is not ASCII",
            "set it to the token alone, one word that begins with hf_",
        )
    return token or None


def named_endpoint(endpoint: str) -> str:
    """For messages: the hub's address, and who said so."""
    named = "HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "the default; HF_ENDPOINT is not set"
    return f"the hub {clean(endpoint)} ({named})"


def explain_refusal(page: str, noun: str, place: str, status: int, authorised: bool, gated: bool) -> KilnError:
    """A hub's refusal, in words.

    Args:
        page: address of the repo.
        noun: what it holds.
        place: where the name of the repo is said.
        status: 401, 403 or 404.
        authorised: whether HF_TOKEN was sent.
        gated: whether its terms must be accepted first; otherwise it may not exist.
    """
    if gated and authorised:
        return KilnError(
            f"{page}: the hub refuses this {noun} to the account of HF_TOKEN ({status})",
            f"open {page} with that account and accept its terms (some owners take days to approve);"
            " HF_TOKEN must have the right to read gated repos",
        )
    if gated:
        return KilnError(
            f"{page}: this {noun} is gated: the hub gives it only to accounts that accepted its terms ({status})",
            f"open {page}, log in, accept the terms, then set HF_TOKEN to a read token of that account",
        )
    again = "HF_TOKEN may be wrong or expired" if authorised else "if it is private, set HF_TOKEN"
    return KilnError(
        f"{page}: the hub has no such {noun}, or does not show it to everyone ({status})",
        f"check the name of the repo in {place}; {again}",
    )

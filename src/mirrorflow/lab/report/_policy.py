"""The policy of a page: its own scripts run, and nothing that a stranger's file brings."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256

__all__ = ["inline", "policy"]

# Styles may be inline: Vega and matplotlib write them into their drawings, and they run nothing.
_RULES = (
    "default-src 'none'",
    "style-src 'unsafe-inline'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
)


def policy(scripts: Iterable[str]) -> str:
    """Return a Content-Security-Policy by which only these inline scripts run.

    Each is known by its hash, so that no other inline script runs, no handler in an attribute, no
    ``javascript:`` address, nothing from the network, and no text that a script would evaluate.

    Parameters
    ----------
    scripts : iterable of str
        The texts between ``<script>`` and ``</script>``.

    Examples
    --------
    >>> policy(["1"]).partition(";")[0]
    "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='"
    """
    known = (b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{text}'" for text in known)
    return "; ".join((f"script-src {allowed}", *_RULES))


def inline(scripts: Iterable[str]) -> str:
    """Return scripts as elements, modules: they run in their order, after the page is read."""
    return "\n".join(f'<script type="module">{script}</script>' for script in scripts)

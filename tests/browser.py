"""A headless Chromium: open a page, give what it has drawn, and fail on what it complains about."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=10000", "--hide-scrollbars",
)  # fmt: skip


def chromium():
    """Find a browser; without one, skip (or fail, where the caller demands one)."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        message = f"no Chromium: none of {', '.join(NAMES)} on PATH"
        if os.environ.get("MIRRORFLOW_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def dom(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Return the page as it is once its scripts have run, and the lines of its console."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [chromium(), *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=600, check=True,
        )  # fmt: skip
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)

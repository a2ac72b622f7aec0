"""With what, where, and from which data a run was made."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import __version__

__all__ = ["checkout", "provenance", "versions"]

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "transformers", "peft")


def provenance(data: Sequence[str], device: str, commit: str) -> dict[str, Any]:
    """Say with what and where a run was made, and the checksum of its data (of its parts).

    ``commit`` is the `checkout` when it began: a long run outlives edits of the files.
    """
    return {
        "versions": {
            "mirrorflow": __version__,
            "python": platform.python_version(),
            **versions(PACKAGES),
        },
        "commit": commit,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "device": device,
        "data": hashlib.sha256("".join(data).encode()).hexdigest()[:12] if data else "none",
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed; some are extras."""
    return {
        n: metadata.version(n) for n in names if any(True for _ in metadata.distributions(name=n))
    }


def checkout() -> str:
    """Return the git commit of the checkout, marked if files other than results differ."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    """Ask git about the checkout that holds this file."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    names: Sequence[str] = path.read_text().splitlines() if path.exists() else ()
    model = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return f"{model[0] if model else platform.processor() or sys.platform} x {os.cpu_count()}"

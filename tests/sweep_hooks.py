"""Observers for the tests of sweeps: each stands for something that goes wrong in a worker."""

import errno
import os
import signal
import time


def kills_itself_once(folder, job):
    """Die by SIGKILL in the first run that logs anything, the first time."""
    mark = folder.parent / "killed"

    def observe(numbers):
        if not mark.exists():
            mark.write_text(folder.name)
            os.kill(os.getpid(), signal.SIGKILL)

    return observe


def kills_itself_always(folder, job):
    def observe(numbers):
        os.kill(os.getpid(), signal.SIGKILL)

    return observe


def waits_to_be_killed(folder, job):
    def observe(numbers):
        time.sleep(6000)

    return observe


def finds_the_disk_full(folder, job):
    def observe(numbers):
        raise OSError(errno.ENOSPC, "No space left on device")

    return observe

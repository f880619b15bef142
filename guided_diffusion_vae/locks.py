"""Lock a folder, so that one process at a time writes into it."""

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
TIMEOUT = 60.0      # seconds


class FolderInUseError(OSError):
    """Another process writes into a folder."""


@contextlib.contextmanager
def locked_folder(folder, flag, user, report=print):
    """Hold the lock of a folder inside the `with` block, so that no second process writes into it.

    The lock is a file that names its holder. On one host the system releases it with the process that holds it. Not
    every shared file system passes locks on: a holder on another host is known by its signs of life, and counts as
    ended if `TIMEOUT` seconds pass without one.

    :param flag: flag of the folder, for the messages.
    :param user: what holds the lock, such as the name of a script.
    :param report: called with a message while waiting, and if the lock of a process that has ended is taken over.
    :raises FolderInUseError: if another process holds it; the message names it.
    """
    path = Path(folder) / LOCK_FILE
    stream, released = _acquire(path, flag, report), threading.Event()
    try:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "user": user,
                  "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        stream.truncate(0)
        stream.write(json.dumps(holder) + "\n")
        stream.flush()
        threading.Thread(target=_show_life, args=(path, released), daemon=True).start()
        yield
    finally:
        released.set()
        with contextlib.suppress(OSError):  # the folder may have been removed
            is_own = os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
            if fcntl is None:       # Windows removes no open file; elsewhere the lock protects it until it is removed
                stream.close()
            if is_own:
                path.unlink()
        stream.close()


def _acquire(path, flag, report):
    """Return the open file of a lock that this process holds from now on."""
    while True:
        stream = open(path, "a+", encoding="utf-8")
        try:
            holder, free = _read_holder(stream), _lock(stream)
            elsewhere = holder and (holder["host"] != socket.gethostname() or free is None)
            if free is False or elsewhere and _shows_life(path, holder, report):
                raise FolderInUseError(errno.EBUSY, f"{path.parent} is in use by {_describe(holder)}: wait until it "
                                       f"has ended, stop it, or set another {flag}")
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                if holder:
                    report(f"{path.parent} was in use by {_describe(holder)}, which has ended without releasing it")
                return stream
        except FileNotFoundError:   # its holder has released it just now
            pass
        except BaseException:
            stream.close()
            raise
        stream.close()


def _lock(stream):
    """Return whether this process now holds the lock of an open file, None if the system has no such locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):   # no fcntl on Windows; not supported by every file system
        return None
    return True


def _read_holder(stream):
    """Return what a lock file says about its holder, None if it is empty or corrupt."""
    stream.seek(0)
    try:
        holder = json.loads(stream.read())
        return {key: str(holder[key]) for key in ("host", "process", "user", "started")}
    except (ValueError, KeyError, TypeError):
        return None


def _describe(holder):
    return ("{user} (process {process} on {host}, started {started})".format(**holder) if holder
            else "another process")


def _show_life(path, released):
    while not released.wait(TIMEOUT / 4):
        with contextlib.suppress(OSError):
            os.utime(path)


def _shows_life(path, holder, report):
    """Return whether the time of a lock file changes while it is watched: clocks of hosts may differ."""
    seen = _modified(path)
    if time.time() - seen > 3600:
        return False
    report(f"{path.parent} is in use by {_describe(holder)}; waiting up to {TIMEOUT:g} s for a sign of life")
    start = time.monotonic()
    while time.monotonic() - start < TIMEOUT:
        time.sleep(min(1.0, TIMEOUT / 4))
        if _modified(path) != seen:
            return True
    return False


def _modified(path):
    with open(path, "rb") as stream:    # network file systems look at the server again when a file is opened
        return os.fstat(stream.fileno()).st_mtime

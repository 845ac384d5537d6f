# SPDX-License-Identifier: Apache-2.0
"""Log lines of the core on their way into Python's logging.

The core never waits for Python: its lines go into a bounded ring in the extension, and one daemon thread,
started when the core is first used, sleeps until there are some and hands them on.  See _ucm_log.c.
"""

import atexit
import logging
import os
import threading
import traceback

from . import _ucm

ERROR, WARN, INFO, DEBUG = range(4)
_LEVELS = {"error": ERROR, "warn": WARN, "warning": WARN, "info": INFO, "debug": DEBUG}
_LOGGING = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_FLUSH_S = 5  # how long the interpreter waits at its end for the last lines to be handed on

_logger = logging.getLogger("ucm")


def _to_logging(level, line):
    _logger.log(_LOGGING[level], "%s", line)


_sink = _to_logging
_asked = None  # the level in UC_LOGGER_LEVEL
_level = INFO
_thread = None
_used = False  # the core has been used, so lines may come at any time


def _hand_on():
    while True:
        lines, lost = _ucm.log_take()
        if not lines:
            return
        if lost:
            lines.append((WARN, f"log: {lost} lines were lost, more came than could be handed on"))
        for level, line in lines:
            try:
                _sink(level, line)
            except Exception:
                traceback.print_exc()


def _start():
    """Called by the extension when the core is first used."""
    global _thread, _used
    _used = True
    if _sink is None:
        return
    _ucm.log_open(_level)
    _thread = threading.Thread(target=_hand_on, name="ucm-log", daemon=True)
    _thread.start()


def _stop():
    global _thread
    if _thread is not None:
        _ucm.log_close()
        if _thread is not threading.current_thread():
            _thread.join(_FLUSH_S)
        _thread = None


def log_to(sink, level=INFO):
    """Log lines up to level go to sink(level, line), or to standard error when sink is None.

    Until this is called they go to the logger "ucm", up to the level in UC_LOGGER_LEVEL.  sink runs in a
    thread of its own; it may do anything but take long.
    """
    global _sink, _level
    if sink is not None and not callable(sink):
        raise TypeError(f"sink: a callable or None is needed, not {sink!r}")
    if level not in range(4):
        level = _level_named(level)
    _sink, _level = sink, level
    if sink is None:
        _ucm.log_default(level)
        _stop()
    elif _thread is not None:
        _ucm.log_open(level)
    elif _used:
        _start()


def share(other):
    """Lines appear among those of another logger, as an engine's.  What UC_LOGGER_LEVEL asks for and that logger holds
    back is the user's wish still: then those of the core go to standard error, all of them, so none comes twice."""
    if _sink is not _to_logging or _logger.handlers:
        return  # somebody has said where they are to go
    if other.handlers:
        _logger.handlers, _logger.propagate = other.handlers, False
        _logger.setLevel(other.level)
    if _asked is not None and not _logger.isEnabledFor(_LOGGING[_asked]):
        log_to(None, _asked)


def _level_named(name):
    try:
        return _LEVELS[name.lower()]
    except (AttributeError, KeyError):
        raise ValueError(f"level: {name!r} is not error, warn, info or debug") from None


def _after_fork():
    """The child has no threads; it gets its own when it first uses the core."""
    global _thread, _used
    _ucm.log_reset()
    _thread, _used = None, False
    _ucm.log_hook(_start)


def _begin():
    global _asked, _level
    name = os.environ.get("UC_LOGGER_LEVEL") or os.environ.get("UCM_LOG_LEVEL")
    try:
        _asked = _level_named(name) if name else None
    except ValueError as e:
        _logger.warning("UC_LOGGER_LEVEL: %s; using info", e)
    _level = INFO if _asked is None else _asked
    _ucm.log_hook(_start)
    os.register_at_fork(after_in_child=_after_fork)
    atexit.register(_stop)


_begin()

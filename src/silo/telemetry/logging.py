"""Structured logs over the standard library: a fixed message and fields, as text or JSON lines.

`SILO_LOG` sets what is shown: a level, or `target=level` pairs, separated by commas, where
a target is the start of a logger's name: `info,silo.shard=debug`.
"""

import json
import logging
import sys
import time
from typing import Literal, TextIO

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}


class Log:
    """Logs events with the fields that its owner has bound."""

    def __init__(self, name: str, **fields: object) -> None:
        self._logger = logging.getLogger(name)
        self._fields = fields

    def bind(self, **fields: object) -> "Log":
        """The same log with more fields in every event."""
        return Log(self._logger.name, **(self._fields | fields))

    def debug(self, message: str, **fields: object) -> None:
        self._emit(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: object) -> None:
        self._emit(logging.INFO, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self._emit(logging.WARNING, message, fields)

    def error(self, message: str, *, exc_info: BaseException | None = None, **fields: object) -> None:
        self._emit(logging.ERROR, message, fields, exc_info)

    def _emit(
        self, level: int, message: str, fields: dict[str, object], exc_info: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": self._fields | fields}
            self._logger.log(level, "%s", message, extra=extra, exc_info=exc_info)


def set_up_logging(
    format: Literal["text", "json"], *, levels: str | None = None, stream: TextIO | None = None
) -> None:
    """Send all logs to `stream`, standard error by default. `levels` is the value of `SILO_LOG`.

    Raises:
        ValueError: `levels` names no known level.
    """
    targets = parse_levels(levels or "")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if format == "json" else _TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(targets.pop("", logging.INFO))
    for target, level in targets.items():
        logging.getLogger(target).setLevel(level)


def parse_levels(text: str) -> dict[str, int]:
    """The level of each target; the empty target stands for all others.

    Raises:
        ValueError: a part is neither a level nor `target=level`.
    """
    levels = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        target, _, name = part.rpartition("=")
        if name.strip().lower() not in _LEVELS:
            raise ValueError(f"SILO_LOG: unknown level {name!r}; known are: {', '.join(_LEVELS)}")
        levels[target.strip()] = _LEVELS[name.strip().lower()]
    return levels


def _at(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return getattr(record, "fields", {})


class _TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        line = f"{_at(record)} {record.levelname.lower():<7} {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "at": _at(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            event.setdefault(name, value)
        if record.exc_info:
            event["error_trace"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)

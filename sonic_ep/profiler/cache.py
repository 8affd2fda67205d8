"""Profiles on disk: the next start at the same shape on the same machine measures nothing."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from sonic_ep.profiler.report import ProfileReport

logger = logging.getLogger("sonic_ep")

DEFAULT_FOLDER = Path("~", ".cache", "sonic_ep", "profiles")


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder of profiles, one file for each key; "~" in front means the user's home.

    A folder or file that cannot be used is logged, not raised: other ranks would wait for the one that raises.
    """

    folder: Path

    def read(self, key: Mapping[str, Any], require: Callable[[ProfileReport], None]) -> ProfileReport | None:
        """The profile of ``key`` that ``require`` does not refuse, or None."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("key") != key:
                raise ValueError("file.key: got that of another profile, expected the one asked for")
            report = ProfileReport.from_json(found.get("profile"))
            require(report)
            return report
        except FileNotFoundError:
            return None
        except Exception as error:
            self._log("measuring anew", error)
            return None

    def write(self, key: Mapping[str, Any], report: ProfileReport) -> None:
        """Keep ``report``, whole or not at all, even if another process writes the same file."""
        document = {"key": key, "profile": report.as_json()}
        try:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid4().hex}.tmp")
            try:
                temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except Exception as error:
            self._log("not kept", error)

    def _log(self, what: str, error: Exception) -> None:
        """One line, in characters that every log can encode."""
        line = " ".join(f"profile cache: {what}, for {self.folder}: {error}".split())
        logger.warning("%s", line.encode("utf-8", "backslashreplace").decode())

    def _path(self, key: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder.expanduser() / f"{name}.json"

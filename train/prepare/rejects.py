"""Why a sample or a source cannot be used: the reasons that the report counts and quarantine.jsonl lists."""

from __future__ import annotations


class Rejected(Exception):
    """One sample is left out. `reason` is a word that is counted, `detail` says more, for one line."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Broken(Exception):
    """A source cannot be read from here on: what was read before is kept, the source is listed by name."""


class PrepareFailed(RuntimeError):
    """The run cannot go on; the message is one line. The same command continues where it stopped."""

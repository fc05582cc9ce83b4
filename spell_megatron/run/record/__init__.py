"""What a run leaves behind, and what is seen of it while it runs."""

from spell_megatron.run.record.archive import Archive
from spell_megatron.run.record.console import Console, Live, step_line
from spell_megatron.run.record.folder import RunFolder
from spell_megatron.run.record.journal import Journal
from spell_megatron.run.record.lock import RunLock, locked
from spell_megatron.run.record.logs import logging_to
from spell_megatron.run.record.metrics import Metrics, read_metrics
from spell_megatron.run.record.report import write_report
from spell_megatron.run.record.stale import forget_stale

__all__ = [
    "Archive",
    "Console",
    "Journal",
    "Live",
    "Metrics",
    "RunFolder",
    "RunLock",
    "forget_stale",
    "locked",
    "logging_to",
    "read_metrics",
    "step_line",
    "write_report",
]

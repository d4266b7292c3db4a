"""Errors that are the user's to fix: one sentence, one hint, one exit code.

`modernbert_align.cli.main` is the only place that prints them. Anything that is not an `AlignError` is a bug
and keeps its traceback (exit code 3).
"""

EXIT_ALIGNED = 0
EXIT_MISALIGNED = 1
EXIT_USAGE = 2
EXIT_BUG = 3
EXIT_ENVIRONMENT = 4
EXIT_NOT_COMPARED = 5
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # as a shell says it of a program that was stopped by a closed pipe


class AlignError(Exception):
    """A problem the user can fix.

    Args:
        message: What is wrong and where, one sentence without a final period.
        hint: What to do about it, one sentence; empty if there is nothing useful to say.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AlignError):
    """An argument that cannot be used: unknown model, fixture, head or value."""


class CheckpointError(AlignError):
    """A checkpoint folder or file that cannot be read, mapped or written."""


class ProofError(AlignError):
    """A conversion that is not what it claims: a proof failed, or a file changed since."""

    exit_code = EXIT_MISALIGNED


class ConfigError(AlignError):
    """A config.json that is absent, invalid, or asks for something that is not supported."""


class SettingsError(AlignError):
    """A project file or an environment variable that says something this program does not know."""


class TableError(AlignError):
    """A name-mapping, probe, tolerance or fixture file that is wrong."""


class ReportError(AlignError):
    """A report that cannot be read, or was changed after it was written."""


class TraceError(AlignError):
    """A trace that cannot be read, was changed after it was written, or does not belong to the other one."""


class MissingPackageError(AlignError):
    """A package or kernel this command needs is not there."""

    exit_code = EXIT_ENVIRONMENT


class RankError(AlignError):
    """A process of a tensor-parallel candidate died, hung or returned nothing, so that nothing could be judged."""

    exit_code = EXIT_NOT_COMPARED

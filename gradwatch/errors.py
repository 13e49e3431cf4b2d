"""Everything gradwatch raises or warns with.

    GradwatchError                 catch this to catch all of them
    ├── ConfigError                an argument is wrong (also a ValueError)
    ├── AttachError                this model or optimizer cannot be watched
    ├── ClosedError                a watch was used after close()
    ├── RecordError                a run's record cannot be read or written (also an OSError)
    ├── AdviceError                on_recommendation="raise" met a recommendation
    └── MissingExtraError          an optional package is needed (also an ImportError)

    GradwatchWarning               on_recommendation="warn" met a recommendation

A message has three parts: which argument or object, what was given, what to do.
"""


class GradwatchError(Exception):
    """Base of all errors that gradwatch raises."""


class ConfigError(GradwatchError, ValueError):
    """An argument has a value that cannot work."""


class AttachError(GradwatchError):
    """The model or the optimizer cannot be watched as given."""


class ClosedError(GradwatchError):
    """A closed watch was used again."""


class RecordError(GradwatchError, OSError):
    """The record of a run cannot be read or written."""


class AdviceError(GradwatchError):
    """Raised on a recommendation when the user asked for `on_recommendation="raise"`."""


class MissingExtraError(GradwatchError, ImportError):
    """An optional package is missing.

    Args:
        feature: what was asked for, as the user would call it.
        extra: the extra of the distribution that brings it.
        cause: the import error that Python gave, if any.
    """

    def __init__(self, feature: str, extra: str, cause: ImportError | None = None) -> None:
        because = f" ({cause})" if cause is not None else ""
        super().__init__(
            f"{feature} needs a package that is not installed{because}; "
            f'install it with: pip install "torch-gradwatch[{extra}]"'
        )


class GradwatchWarning(UserWarning):
    """Category of the warnings that `on_recommendation="warn"` issues."""

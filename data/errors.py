"""Every error that reasonscope raises on purpose. Each message says what was given, what is allowed and what to do."""


class ReasonscopeError(Exception):
    """Base class of all errors of this package.

    The command line prints such an error as one line and exits with status 2; any other exception is a bug.

    Example:
        try:
            store = rs.record(model, problems, "runs/mine")
        except rs.ReasonscopeError as error:
            raise SystemExit(f"recording failed: {error}")
    """


class InputError(ReasonscopeError, ValueError):
    """An argument, a file or the content of a file is invalid. Also a `ValueError`."""


class SiteError(ReasonscopeError, LookupError):
    """A site that does not exist, or that this model lacks (layer out of range, no router). Also a `LookupError`."""


class ArchitectureError(ReasonscopeError, TypeError):
    """A model whose architecture has no row in the layout table, or that does not behave as its row says. Also a
    `TypeError`."""


class ModelLoadError(ReasonscopeError, OSError):
    """A model folder or hub id that is missing or corrupt, or whose weights are not safetensors. Also an `OSError`."""


class ContextError(ReasonscopeError, ValueError):
    """A prompt, or a prompt with its completion, that is longer than the model's context. Also a `ValueError`."""


class StoreError(ReasonscopeError, OSError):
    """A trace store that is missing, damaged, locked, of a newer version, or not writable. Also an `OSError`."""


class MissingExtraError(ReasonscopeError, ImportError):
    """An optional dependency is not installed; the message names the extra to install. Also an `ImportError`."""

"""Every error that reasonscope raises on purpose. Each says what was given, what is allowed and what to do."""


class ReasonscopeError(Exception):
    """Root of all errors of this package; the command line prints it as one line and exits with status 2."""


class InputError(ReasonscopeError, ValueError):
    """An argument, a file or its content is not what it has to be."""


class SiteError(ReasonscopeError, LookupError):
    """A site that does not exist, or does not exist on this model (layer out of range, no router)."""


class ArchitectureError(ReasonscopeError, TypeError):
    """A model whose architecture has no row in the layout table, or does not behave as its row says."""


class ModelLoadError(ReasonscopeError, OSError):
    """A model folder or hub id that is missing, corrupt, or holds weights that are not safetensors."""


class ContextError(ReasonscopeError, ValueError):
    """A prompt (or prompt plus completion) longer than the model's context."""


class StoreError(ReasonscopeError, OSError):
    """A trace store that is missing, damaged, locked, of a newer version, or cannot be written."""


class MissingExtraError(ReasonscopeError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

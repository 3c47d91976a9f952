"""Every error this package raises on purpose. A message says what, where, and the mend."""


class MemlawError(Exception):
    """Root of the package's errors. `exit_code` is what the command line exits with."""

    exit_code = 2


class DataError(MemlawError):
    """The records can't be used as they are: unreadable, empty, contradictory, too long."""


class ModelError(MemlawError):
    """The base model can't be found, read, or used."""


class AdapterError(MemlawError):
    """The adapter, its placement, or the folder it lies in doesn't fit the base model."""


class ConfigError(MemlawError):
    """A setting is unknown, out of range, or contradicts another."""


class OutputError(MemlawError):
    """The output folder can't be used: it holds something else, or can't be written."""


class CertificateError(MemlawError):
    """A certificate can't be read, or was made by an incompatible version."""


class SignatureError(MemlawError):
    """A folder isn't what was signed, or was signed with another key."""

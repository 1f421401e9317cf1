"""Checkpoint formats and families -> names, shapes and layouts of our own. Data in, data out."""


class ConversionError(ValueError):
    """A checkpoint that is corrupt, incomplete, or of a kind that no converter handles."""


class UnsupportedOptionError(ConversionError):
    """A family, or an attribute of its config, that no converter handles."""

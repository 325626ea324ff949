"""Every error a user can cause: each says what was found, what was wanted and the way out."""


class MminferError(Exception):
    """Base class: catch it to tell a wrong request from a defect."""


class ConfigError(MminferError, ValueError):
    """A setting is out of range or does not fit the model."""


class UnsupportedModelError(MminferError):
    """The model's family, or a feature of this model, is not supported."""


class InputError(MminferError, ValueError):
    """The request itself is wrong: messages, images, videos, prompt or arguments."""

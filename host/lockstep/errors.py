"""What can go wrong before a model runs: one class per kind of mistake, one sentence per message.

Every message says what was wrong, where, and what to do next.
"""

from __future__ import annotations


class ModelError(Exception):
    """Something about a model, its files or its input that the user can put right."""


class ModelNotFoundError(ModelError):
    """There is no such folder, no such model in the local cache, or the package that carries it is not installed."""


class ConfigurationMissingError(ModelError):
    """A model folder has no readable ``config.json``."""


class CheckpointError(ModelError):
    """The weights cannot be read: missing, truncated or corrupt files, or a format that is refused."""


class TensorError(ModelError):
    """A tensor of a checkpoint is missing, not wanted, of a wrong dtype or shape, or not finite."""


class UnknownArchitectureError(ModelError):
    """The configuration names an architecture that the installed transformers does not have."""


class CaptureError(ModelError):
    """``torch.export`` could not capture the module, or the capture holds something that has no meaning here."""


class FallbackError(ModelError):
    """A model was asked for without fallbacks and has some; the message names every one and its reason."""


class TokenizerError(ModelError):
    """A model folder has no tokenizer, or one that cannot be read."""


class SequenceLengthError(ModelError):
    """A sequence is empty or longer than the model's positions."""


class InputError(ModelError):
    """Inputs of a graph are missing, unknown, or of a wrong shape or type."""


class PoolingError(ModelError):
    """A sentence-transformers folder asks for a pooling or a module that is not known."""


class PrescaleError(ModelError):
    """A pre-scale file cannot be read or does not fit the model."""


class WeightFormatError(ModelError):
    """A format of weights that there is none of, or that a layer does not fit."""


class QuantisedCheckpointError(ModelError):
    """A quantised checkpoint is of an unknown scheme, lacks scales, or contradicts itself."""

"""The export format under the names that training has for it; :mod:`cohobate.models.exports` is the format itself."""

from cohobate.models.exports import (
    CONFIG,
    DECODER,
    WEIGHTS,
    describe,
    export,
    find_export,
    load_decoder,
    load_encoder,
    read_config,
)

__all__ = [
    "CONFIG", "DECODER", "WEIGHTS", "describe", "export", "find_export", "load_decoder", "load_encoder", "read_config",
]  # fmt: skip

"""Adapters to other people's kernels, each small and lazy, and the measured table that chooses between them and ours.

No optional package is imported before it is asked about, and one that is installed but broken is a reason, never an
exception. ``probe`` asks the questions; ``attention``, ``norm`` and ``optimizer`` choose.
"""

from cohobate.kernels.backends.attention import attend, use_attention
from cohobate.kernels.backends.norm import layer_norm
from cohobate.kernels.backends.optimizer import adamw

__all__ = ["adamw", "attend", "layer_norm", "use_attention"]

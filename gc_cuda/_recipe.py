"""The name that pickles of accelerated models made by gc_cuda 0.1.0 look up here."""

from gc_cuda._fused import fused_forward

__all__ = ["fused_forward"]

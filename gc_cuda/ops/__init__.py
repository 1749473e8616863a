"""The operators ``torch.ops.gc_cuda`` from Python; the public part is :mod:`gc_cuda.functional`."""

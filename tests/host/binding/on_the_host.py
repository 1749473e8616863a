"""A plugin of pytest: the CUDA binding and its kernels, on the CPU, serve the CPU's tensors."""

from __future__ import annotations

import os
import warnings

import torch

import gc_cuda  # noqa: F401  (defines the operators)

torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.ops.load_library(os.environ["GC_CUDA_BINDING"])

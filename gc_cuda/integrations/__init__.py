"""One file for each framework; gc_cuda imports no framework before its user does.

To import ``gc_cuda.integrations.mmcv`` registers the block with mmcv. The other files describe the blocks of
their frameworks for :func:`gc_cuda.accelerate` and :func:`gc_cuda.insert`.
"""

"""One file for each framework; none of them is imported by gc_cuda before it is needed.

``gc_cuda.integrations.mmcv`` is for importing: it registers the block with mmcv. The others describe their
frameworks' blocks for :func:`gc_cuda.accelerate` and :func:`gc_cuda.insert`, and import no framework.
"""

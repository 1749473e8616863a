"""Blocks recognized by what they compute, whatever their classes are called.

A module is traced on a copy (:mod:`.tracing`). If its graph is a pooling over the pixels, something small,
and a broadcast (:mod:`.formula`, with :mod:`.operations` and :mod:`.values`), and all that its Python code
reads is known and can be compared per call (:mod:`.source`, :mod:`.structure`), and the fused way gives the
same numbers (:mod:`.proof`), then there is a plan for modules of that structure (:mod:`.plan`,
:mod:`.fused`). :mod:`.blocks` puts this together.
"""

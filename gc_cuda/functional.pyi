from gc_cuda.ops.functional import *  # noqa: F403  (gc_cuda/_paths.py)

from gc_cuda.models.insert import *  # noqa: F403  (gc_cuda/_paths.py)

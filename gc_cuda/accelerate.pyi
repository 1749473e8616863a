from gc_cuda.models.accelerate import *  # noqa: F403  (gc_cuda/_paths.py)

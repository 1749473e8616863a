from gc_cuda.models.convert import *  # noqa: F403  (gc_cuda/_paths.py)

"""What is done to whole models: the public parts are in :mod:`gc_cuda`, too."""

"""Modules keep the paths that users import and pickles name, wherever they lie, and each is imported once."""

from __future__ import annotations

import importlib
import io
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import bottlenecks
import pytest
import torch

import gc_cuda
from gc_cuda import _paths

PACKAGE = Path(gc_cuda.__file__).parent
OLD_FILES = sorted((Path(__file__).parent / "old_files").glob("*.pt"))
assert OLD_FILES, "they lie beside this file"
# What the documentation names, by the module in which it does.
PUBLIC = {
    "gc_cuda": gc_cuda.__all__,
    "gc_cuda.accelerate": ["accelerate", "restore", "Report", "Entry"],
    "gc_cuda.blocks": ["ContextBlock", "NonLocalBlock", "SEBlock", "SimplifiedNonLocalBlock"],
    "gc_cuda.blocks.context": ["ContextBlock"],
    "gc_cuda.blocks.non_local": ["NonLocalBlock", "SimplifiedNonLocalBlock", "MODES"],
    "gc_cuda.blocks.squeeze_excite": ["SEBlock"],
    "gc_cuda.convert": ["convert_state_dict", "FRAMEWORKS"],
    "gc_cuda.functional": [
        *("attention_pool", "average_pool", "softmax_pool"),
        *("broadcast_add", "broadcast_mul", "broadcast_mul_add", "global_context"),
    ],
    "gc_cuda.insert": ["insert"],
    "gc_cuda.integrations.gcnet": ["KINDS"],
    "gc_cuda.integrations.mmdet": ["KINDS"],
    "gc_cuda.integrations.timm": ["KINDS"],
    "gc_cuda.integrations.torchvision": ["KINDS"],
    "gc_cuda.reference": [
        *("ContextBlock", "Transform", "attention_pool", "average_pool", "softmax_pool", "transform"),
        *("broadcast_add", "broadcast_mul", "broadcast_mul_add", "global_context"),
    ],
}
SETTLED = {*PUBLIC, "gc_cuda._pages"}  # the latter has the public function keep_pages


def ours(path: str) -> ModuleType:
    """The module; an editable install lends those of another checkout."""
    module = importlib.import_module(path)
    assert PACKAGE in Path(module.__file__).parents
    return module


def named_in(pickled: bytes) -> set[tuple[str, str]]:
    """The module and name of everything of ours that a pickle of protocol 2 looks up."""
    looked_up = [
        argument.split(" ") for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"
    ]
    return {(module, name) for module, name in looked_up if module.split(".")[0] == "gc_cuda"}


def content(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


OLD_NAMES = set().union(*(named_in(content(path)) for path in OLD_FILES))


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_path_gives_the_same_objects(path):
    module = ours(path)
    for name in PUBLIC[path]:
        value = getattr(module, name)
        if path != "gc_cuda" and name in gc_cuda.__all__ and not path.startswith("gc_cuda.reference"):
            assert value is getattr(gc_cuda, name)
        where = getattr(value, "__module__", path)
        if where.startswith("gc_cuda."):
            assert where in SETTLED, f"{name} says that it is of {where}"
            assert getattr(ours(where), name) is value


def test_every_path_can_be_the_first_import():
    of_pickles = {path for path, _ in OLD_NAMES} - {"gc_cuda.integrations.mmcv"}  # which needs mmcv
    paths = PUBLIC | {path: [] for path in of_pickles - set(PUBLIC)}
    program = f"""
import importlib, sys
for path, names in {paths!r}.items():
    for name in [name for name in sys.modules if name.split(".")[0] == "gc_cuda"]:
        del sys.modules[name]
    module = importlib.import_module(path)
    assert sys.modules[path] is module and module.__file__.startswith({str(PACKAGE)!r})
    for name in names:
        scope = {{}}
        exec(f"from {{path}} import {{name}}", scope)
        assert scope[name] is getattr(module, name), (path, name)
    scope = {{}}
    exec(f"import {{path}} as imported", scope)
    assert scope["imported"] is module or callable(scope["imported"]), path
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", _paths.PATHS)
def test_a_path_is_the_module_of_its_room(name):
    room = _paths.PATHS[name]
    assert importlib.import_module(f"gc_cuda.{name}") is room
    assert importlib.import_module(room.__name__) is room
    if not name.startswith("_"):
        stub = PACKAGE / f"{name}.pyi"
        assert stub.read_text().startswith(f"from {room.__name__} import *")


def test_old_pickles_name_what_is_there():
    assert {("gc_cuda._recipe", "fused_forward"), ("gc_cuda._swap", "_new")} < OLD_NAMES
    for module, name in OLD_NAMES - {("gc_cuda.integrations.mmcv", "ContextBlock")}:
        assert callable(getattr(ours(module), name))


@pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: path.stem)
def test_pickles_made_now_name_no_path_that_moves(path):
    """Neither a room nor any private path beyond those that stay for old files."""
    try:
        module = torch.load(path, weights_only=False)["module"]
    except ImportError as error:
        pytest.skip(str(error))
    file = io.BytesIO()
    torch.save(module, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        made_now = named_in(archive.read(name))
    assert made_now
    assert {where for where, _ in made_now - OLD_NAMES} <= set(PUBLIC)


@pytest.mark.usefixtures("frameworks")
@pytest.mark.parametrize("framework", [bottlenecks.TORCHVISION, bottlenecks.MMDET])
def test_pickles_of_tails_name_no_path_that_moves(framework):
    net = bottlenecks.new_net(framework)
    gc_cuda.accelerate(net)
    named = named_in(pickle.dumps(net, protocol=2))
    assert ("gc_cuda.accelerate", "tail_forward") in named
    assert {where for where, _ in named - OLD_NAMES} <= set(PUBLIC)


def test_what_the_package_offers_pickles_by_a_public_path():
    report = gc_cuda.accelerate(gc_cuda.ContextBlock(4, 1 / 2))
    offered = [value for name in gc_cuda.__all__ if callable(value := getattr(gc_cuda, name))]
    named = named_in(pickle.dumps((report, *offered), protocol=2))
    assert ("gc_cuda.accelerate", "Report") in named
    assert len(named) == len(offered)
    assert {module for module, _ in named} <= SETTLED


def test_every_module_is_imported_once_and_registers_once():
    program = """
import collections, importlib, pkgutil, sys, types

registered = []
registry = types.SimpleNamespace(register_module=lambda **arguments: registered.append(arguments))
mmcv, mmcv.cnn = types.ModuleType("mmcv"), types.SimpleNamespace(PLUGIN_LAYERS=registry)
sys.modules.update({"mmcv": mmcv, "mmcv.cnn": mmcv.cnn})

import gc_cuda

assert not registered
importlib.import_module("gc_cuda.integrations.mmcv")
for found in pkgutil.walk_packages(gc_cuda.__path__, "gc_cuda."):
    importlib.import_module(found.name)
import gc_cuda.integrations.mmcv as one
from gc_cuda.integrations import mmcv as two
from gc_cuda.integrations.mmcv import ContextBlock

assert one is two and registered == [dict(name="ContextBlock", force=True, module=ContextBlock)]
modules = {id(module): module for name, module in sys.modules.items() if name.split(".")[0] == "gc_cuda"}
files = collections.Counter(module.__file__ for module in modules.values())
assert len(files) > 20 and set(files.values()) == {1}, files
"""
    subprocess.run([sys.executable, "-c", program], check=True)

"""What the extension is made of, as one short text: setup.py writes it into the binary, and in a checkout the
import compares the two. setup.py loads this file by its path, so it imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import os

_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def is_checkout(root: str) -> bool:
    """Whether the folder has the sources, as a clone has and a place of installed packages has not."""
    return all(
        os.path.isfile(os.path.join(root, *path)) for path in (("setup.py",), ("csrc", "ops", "schema.cpp"))
    )


def fingerprint(root: str) -> str:
    """A hash of the names and contents of csrc/ and of setup.py, which has the compiler's options.

    It does not depend on line endings, on the order of a directory, or on the files that editors leave.
    """
    digest = hashlib.sha256()
    paths = [os.path.join(root, "setup.py")]
    for folder, folders, names in os.walk(os.path.join(root, "csrc")):
        folders.sort()
        paths += [
            os.path.join(folder, name)
            for name in sorted(names)
            if name.endswith(_SUFFIXES) and not name.startswith(".")
        ]
    for path in paths:
        with open(path, "rb") as file:
            text = file.read().replace(b"\r\n", b"\n")
        name = os.path.relpath(path, root).replace(os.sep, "/")
        digest.update(f"{name} {len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()[:16]

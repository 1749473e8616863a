"""Where the checkout lies, and the folders of it that tests read or start programs from."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BENCH = ROOT / "bench"

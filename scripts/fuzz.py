"""Gives files that are nearly right to the code that reads them: python scripts/fuzz.py --help"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tests" / "faults" / "fuzz.py"), run_name="__main__")

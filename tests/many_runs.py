"""Runs several commands one after the other on the ranks it is started with: `torchrun
tests/many_runs.py commands.json`.

Starting ranks costs seconds and a tiny run milliseconds, so the tests start ranks once for all
their runs.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import run_here

from preflab.distributed import process_group

if __name__ == "__main__":
    process_group.world()
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        run_here(*overrides)
    process_group.leave()

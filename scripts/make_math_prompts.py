"""Write prompts for reward=math: distinct bracketed expressions, one {"prompt": "((3+2)*4) = "} per
line.

    python scripts/make_math_prompts.py --output data/math_prompts.jsonl --n 5000
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.rewards.arithmetic import math_prompts
from preflab.settings.refused import errors_in_one_line
from utils import atomic_write, path_argument


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=path_argument, required=True, help="JSON-lines file to write"
    )
    parser.add_argument("--n", type=int, default=5000, help="prompts; fewer if too many repeat")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompts = list(dict.fromkeys(math_prompts(2 * arguments.n, arguments.seed)))[: arguments.n]
    with atomic_write(arguments.output) as f:
        f.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    print(f"{arguments.output}: {len(prompts):,} prompts")


if __name__ == "__main__":
    with errors_in_one_line():
        main()

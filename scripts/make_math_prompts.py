"""Write prompts for reward=math: different bracketed expressions, a line each, {"prompt":
"((3+2)*4) = "}.

python scripts/make_math_prompts.py --output data/math_prompts.jsonl --n 5000
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.rewards.arithmetic import math_prompts
from utils import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompts = list(dict.fromkeys(math_prompts(2 * arguments.n, arguments.seed)))[: arguments.n]
    with atomic_write(arguments.output) as f:
        f.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    print(f"{arguments.output}: {len(prompts):,} prompts")


if __name__ == "__main__":
    main()

"""From the start of a process to the first token of the shipped model, with an empty and with a full compilation cache.

python -m benchmarks.startup --runs 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise

STAGES = ("interpreter", "import jax", "import jaxengine.llm", "LLM()", "first token")
CHILD = """
import sys, time
marks = [time.time()]
import jax; marks.append(time.time())
from jaxengine.request import SamplingParams
from jaxengine.llm import LLM; marks.append(time.time())
llm = LLM(compilation_cache=sys.argv[1]); marks.append(time.time())
for output in llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=8), stream=True):
    marks.append(time.time())
    break
llm.close()
import json; print(json.dumps(marks))
"""


def start(cache: str, *options: str) -> list[float]:
    """Seconds that each stage of one fresh process took."""
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    spawned = time.time()
    done = subprocess.run(
        [sys.executable, *options, "-c", CHILD, cache], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    marks = [spawned, *json.loads(done.stdout.splitlines()[-1])]
    return [later - earlier for earlier, later in pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts with a full cache; the median is shown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        cold = start(cache)
        runs = [start(cache) for _ in range(args.runs)]
    warm = [statistics.median(stage) for stage in zip(*runs)]
    print(f"{'seconds':<22}{'cold cache':>12}{'warm cache':>12}")
    for name, *values in (*zip(STAGES, cold, warm), ("all", sum(cold), statistics.median(map(sum, runs)))):
        print(f"{name:<22}" + "".join(f"{value:12.2f}" for value in values))


if __name__ == "__main__":
    main()

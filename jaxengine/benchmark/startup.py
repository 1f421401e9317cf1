"""From the start of a process to its first token, with an empty and with a full compilation cache."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from jaxengine.errors import EngineError

STAGES = ("interpreter", "import jax", "import jaxengine.llm", "LLM()", "first token")
CHILD = """
import time
marks = [time.time()]
import jax; marks.append(time.time())
from jaxengine.llm import LLM; marks.append(time.time())
import json, sys
from jaxengine.benchmark.serving import fixed_length, random_prompts
options, input_len = json.loads(sys.argv[1])
llm = LLM(**options); marks.append(time.time())
for _ in llm.generate(random_prompts(1, input_len, llm.vocab_size), fixed_length(8), stream=True):
    marks.append(time.time())
    break
llm.close()
print(json.dumps(marks))
"""


def start(options: Mapping[str, Any], input_len: int) -> dict[str, float]:
    """Seconds that each stage of one fresh process took, and all of them. `options` are LLM's.

    Raises EngineError with what a process that failed said last.
    """
    command = [sys.executable, "-c", CHILD, json.dumps([dict(options), input_len])]
    spawned = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EngineError(f"the process that was timed failed: {said[-1]}")
    marks = [spawned, *json.loads(done.stdout.splitlines()[-1])]
    stages = [later - earlier for earlier, later in pairwise(marks)]
    return dict(zip(STAGES, stages, strict=True)) | {"all": sum(stages)}


def run(
    options: Mapping[str, Any],
    input_len: int,
    runs: int,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """One start with an empty cache, `runs` with the one it filled. Seconds: medians, and those of each run.

    `on_run(done, total)` reports progress. Raises EngineError when a process fails.
    """
    times = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for done in range(1, runs + 2):
            times.append(start({**options, "compilation_cache": cache}, input_len))
            on_run(done, runs + 1)
    median = {stage: statistics.median(run[stage] for run in times[1:]) for stage in times[0]}
    return {"cold": times[0], "warm": median, "warm_runs": times[1:]}


def table(result: Mapping[str, Any]) -> str:
    """What `run` gave, for people."""
    lines = [f"{'seconds':<22}{'cold cache':>12}{'warm cache':>12}"]
    lines += [f"{stage:<22}{cold:12.2f}{result['warm'][stage]:12.2f}" for stage, cold in result["cold"].items()]
    return "\n".join(lines)

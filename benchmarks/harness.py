"""lm-evaluation-harness on HellaSwag and GSM8K from local files: jaxengine beside the harness's own model `hf`.

    python -m benchmarks.harness --model SmolLM2-135M-Instruct.Q4_1.gguf --data FOLDER --reference-python PYTHON

FOLDER holds hellaswag.jsonl (ctx, endings, label) and gsm8k.jsonl (question, answer); PYTHON has torch, transformers
and lm_eval. Both sides run in float32 on all cores; they take turns, once for each batch size of `hf`. Loading the
model and the first rows, which compile the programs, are not timed.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from benchmarks.common import peer_results, report
from benchmarks.local_tasks import GSM8K, HELLASWAG, evaluate, write_tasks

TASKS = {"hellaswag": HELLASWAG, "gsm8k": GSM8K}
PAGE_SIZE, ROWS = 4, 64  # the endings of a question share whole pages; rows enough to fill steps of 512 tokens
SHOTS = 3  # GSM8K: the file's last rows stand before each question, answered
SHOWN = ("task", "seconds", "cpu_seconds", "metrics")
WARMUP = 20  # rows that are not timed


def documents(data: Path, task: str, rows: int) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (data / f"{task}.jsonl").read_text().splitlines()]
    if task == "gsm8k":
        shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in found[-SHOTS:])
        found = [{**row, "shots": shots} for row in found[:-SHOTS]]
    return found[:rows]


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How the answers of two results differ."""
    pairs = list(zip(one["answers"], other["answers"], strict=True))
    if isinstance(pairs[0][0], str):
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} texts are the same"
    worst = max(abs(a[0] - b[0]) for a, b in pairs)
    flags = sum(a[1] != b[1] for a, b in pairs)
    return f"log-likelihoods differ by {worst:.1e} at most, {flags} of {len(pairs)} greedy flags"


def times(one: Mapping[str, Any]) -> str:
    return f"{one['seconds']:.1f} s (CPU {one['cpu_seconds']:.1f} s)"


def compare(task: str, ours: Sequence[Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> None:
    print(f"\n{task}, {len(ours[0]['answers'])} requests, {len(os.sched_getaffinity(0))} cores")
    print(f"jaxengine          {', '.join(map(times, ours))}  {ours[0]['metrics']}")
    for size, one in theirs.items():
        same = "equal" if one["metrics"] == ours[0]["metrics"] else "OTHER METRICS"
        print(f"hf, batch size {size:<3} {times(one)}  {one['metrics']} {same}; {difference(ours[0], one)}")
    if theirs:
        for name, clock in (("wall time", "seconds"), ("CPU time", "cpu_seconds")):
            best, worst = min(one[clock] for one in theirs.values()), max(one[clock] for one in ours)
            print(f"{best / worst:.2f} times as fast as hf at its best batch size, by {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' JSONL files")
    parser.add_argument("--tasks", default="hellaswag,gsm8k")
    parser.add_argument("--rows", type=int, default=10**9, help="of each task, the first ones")
    parser.add_argument("--batch-sizes", default="1,8,32", help="of hf")
    parser.add_argument("--reference-python", help="interpreter for hf; without it jaxengine runs alone")
    args = parser.parse_args()

    from jaxengine.evaluate.harness import HarnessLM

    tasks = args.tasks.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for name, rows in (("timed", args.rows), ("warmup", min(args.rows, WARMUP))):
            folders.append(Path(temporary) / name)
            folders[-1].mkdir()
            chosen = {task: TASKS[task] for task in tasks}
            write_tasks(folders[-1], chosen, {task: documents(args.data, task, rows) for task in tasks})
        timed, warmup = folders
        lm = HarnessLM(str(args.model), dtype="float32", page_size=PAGE_SIZE, batch_size=ROWS)
        for task in tasks:
            evaluate(lm, warmup, task)
        ours: dict[str, list[Any]] = {task: [] for task in tasks}
        theirs: dict[str, dict[int, Any]] = {task: {} for task in tasks}
        peer = Path(__file__).with_name("harness_hf.py")
        for size in map(int, args.batch_sizes.split(",") if args.reference_python else "0"):
            if size:
                command = f"{args.reference_python} {peer} --model {args.model.resolve()} --folder {timed} "
                command += f"--warmup {warmup} --tasks {args.tasks} --batch-size {size}"
                for row in peer_results(command):
                    theirs[row["task"]][size] = row
                    report({"engine": f"hf {size}", **{k: row[k] for k in SHOWN}})
            for task in tasks:
                lm.llm.reset_prefix_cache()
                ours[task].append(found := evaluate(lm, timed, task) | {"task": task})
                report({"engine": "jaxengine", **{k: found[k] for k in SHOWN}})
        lm.llm.close()
    for task in tasks:
        compare(task, ours[task], theirs[task])


if __name__ == "__main__":
    main()

"""lm-evaluation-harness's own model `hf` on the tasks that `benchmarks.harness` wrote; run by it.

Needs torch, transformers and lm_eval. Prints a line `RESULT {...}` for each task.

    python harness_hf.py --model FILE.gguf --folder TASKS --tasks hellaswag --warmup WARMUP_TASKS --batch-size 8
"""

import argparse
import json
import sys
from pathlib import Path

from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.local_tasks import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--warmup", type=Path, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    args = parser.parse_args()
    lm = HFLM(
        pretrained=str(args.model.parent), gguf_file=args.model.name, tokenizer=None, dtype="float32", device="cpu",
        batch_size=args.batch_size,
    )  # fmt: skip
    for task in args.tasks.split(","):
        evaluate(lm, args.warmup, task)
        print("RESULT " + json.dumps(evaluate(lm, args.folder, task) | {"task": task}), flush=True)


if __name__ == "__main__":
    main()

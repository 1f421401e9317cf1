"""Tasks of lm-evaluation-harness on local data. Needs lm_eval to run them, and neither torch nor jax."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# As lm-evaluation-harness has them, but for local rows: these hold GSM8K's few-shot examples themselves (`shots`).
HELLASWAG: Mapping[str, Any] = {
    "output_type": "multiple_choice", "doc_to_text": "{{ctx}}", "doc_to_choice": "{{endings}}",
    "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
GSM8K: Mapping[str, Any] = {
    "output_type": "generate_until", "doc_to_text": "{{shots}}Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "max_gen_toks": 128, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "ignore_case": True, "regexes_to_ignore":
                     [",", "\\$", "(?s).*#### ", "\\.$"]}],
    "filter_list": [
        {"name": "strict-match", "filter": [
            {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}, {"function": "take_first"}]},
        {"name": "flexible-extract", "filter": [
            {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
            {"function": "take_first"}]},
    ],
}  # fmt: skip


def write_tasks(
    folder: Path, tasks: Mapping[str, Mapping[str, Any]], documents: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Path:
    """The tasks as files that lm_eval reads (`include_path`), beside their documents; returns the folder."""
    for name, task in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                  "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **task}))
    return folder


def evaluate(lm: Any, folder: Path, task: str) -> dict[str, Any]:
    """{"metrics": {name: value}, "answers": [answer of each request], "seconds", "cpu_seconds"} of a task in `folder`.

    cpu_seconds: of all threads of this process; who waits for a core that others use does not pay for it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    start, cpu = time.perf_counter(), time.process_time()
    found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    samples = {sample["doc_id"]: sample for sample in found["samples"][task]}  # once, however many filters there are
    metrics = {name: float(value) for name, value in found["results"][task].items()
               if isinstance(value, float) and "stderr" not in name}  # fmt: skip
    answers = [answer for _, sample in sorted(samples.items()) for [answer] in sample["resps"]]
    return {"metrics": metrics, "answers": answers, "seconds": seconds, "cpu_seconds": cpu}

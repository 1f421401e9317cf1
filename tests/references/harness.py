"""Tasks of lm-evaluation-harness on local data, and what is kept of their results. Needs lm_eval to run them, no torch.

`make_harness.py` wrote harness.json: documents from Python's standard library, and what lm_eval's own model `hf`
answered to every request they lead to.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parent / "harness.json"
TASKS: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{answer}}", "target_delimiter": "",
               "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "until": {"output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{name}}",
              "generation_kwargs": {"until": ["\n\n", "def "], "max_gen_toks": 24},
              "filter_list": [{"name": "first-name", "filter": [
                  {"function": "regex", "regex_pattern": "self\\.(\\w+)"}, {"function": "take_first"}]}],
              "metric_list": [{"metric": "exact_match"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]},
}  # fmt: skip


@cache
def fixture() -> dict[str, Any]:
    """{"versions", "documents": {task: rows}, "results": as `evaluate` gives them}."""
    return json.loads(FIXTURE.read_text())


def write_tasks(folder: Path, documents: Mapping[str, Sequence[Any]]) -> Path:
    """The tasks as files that lm_eval reads (`include_path`), beside their documents; returns the folder."""
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                  "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))
    return folder


def evaluate(lm: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """{task: {"metrics": {name: value}, "answers": [answer of each request]}} of the tasks in `folder`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)
    results = {}
    for name in TASKS:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metrics = {key: value for key, value in found["results"][name].items()
                   if isinstance(value, float) and "stderr" not in key}  # fmt: skip
        results[name] = {"metrics": metrics, "answers": [answer for sample in samples for [answer] in sample["resps"]]}
    return results

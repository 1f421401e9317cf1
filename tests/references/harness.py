"""Tasks of lm-evaluation-harness on documents that are kept with their results. Needs neither lm_eval nor torch.

`make_harness.py` wrote harness.json: documents from Python's standard library, and what lm_eval's own model `hf`
answered to every request they lead to.
"""

import json
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
    """{"versions", "documents": {task: rows}, "results": {task: as local_tasks.evaluate gives them}}."""
    return json.loads(FIXTURE.read_text())

"""Makes harness.json: what lm-evaluation-harness's own model `hf` answers with the model that ships with the package.

`--check` makes the answers again, of the documents that the fixture holds, and compares.
"""

import argparse
import importlib
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import local_tasks
from tests.references import harness
from tests.references.make_shipped import ASSETS

CHOICES, LINES = 4, 6  # endings of a question; lines of its context
LONG = 8000  # characters, of which the model's 1024 positions do not hold all
MODULES = ("bisect", "colorsys", "sched", "shlex", "fnmatch", "textwrap")


def documents() -> dict[str, list[dict[str, Any]]]:
    """Questions about this Python's standard library: which line comes next, which attribute, how probable it is."""
    choice, until = [], []
    for number, name in enumerate(MODULES):
        lines = inspect.getsource(importlib.import_module(name)).splitlines()
        places = [i for i in range(LINES, len(lines)) if len(lines[i].strip()) > 8]
        for place in places[3 :: len(places) // 5]:
            answer = (place + number) % CHOICES
            others = [places[(17 * i + place) % len(places)] for i in range(CHOICES)]
            choices = [("\n" + lines[place if i == answer else other]) for i, other in enumerate(others)]
            # The spaces at its end belong to the endings.
            choice.append({"context": "\n".join(lines[place - LINES : place]) + "  ", "choices": choices,
                           "answer": answer})  # fmt: skip
        for place in [i for i in range(LINES, len(lines)) if "self." in lines[i]][::9][:6]:
            before, _, after = lines[place].partition("self.")
            word = after[: next((i for i, c in enumerate(after) if not (c.isalnum() or c == "_")), len(after))]
            until.append({"context": "\n".join([*lines[place - LINES : place], before.rstrip()]), "name": word})
    texts = [inspect.getsource(importlib.import_module(name))[:LONG] for name in ("textwrap", "colorsys", "this")]
    long = {"context": texts[0], "choices": ["\n\n", "\n\nclass", " return x", "\n" * 9], "answer": 1}
    empty = {"context": "", "choices": ["import os", "def f(x):", "class", "<|endoftext|>import"], "answer": 0}
    return {"choice": [*choice, long, empty], "until": until, "rolling": [{"text": text} for text in texts]}


def compare(old: dict[str, Any], made: dict[str, Any]) -> float:
    """The largest difference of a log-likelihood. Raises AssertionError when anything else differs."""
    worst = 0.0
    for task, one in old.items():
        other = made[task]
        for a, b in zip(one["answers"], other["answers"], strict=True):
            if isinstance(a, str):
                assert a == b, f"{task}: {a!r} was {b!r}"
                continue
            (x, greedy), (y, also) = (value if isinstance(value, list) else (value, True) for value in (a, b))
            assert greedy == also, f"{task}: {a} was {b}"
            worst = max(worst, abs(x - y))
        for name, value in one["metrics"].items():
            assert abs(value - other["metrics"][name]) < 1e-5 * max(1, value), f"{task}: {name} was {value}"
    assert worst < 2e-4, f"log-likelihoods differ by {worst:.1e}"
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixture instead of writing it")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    [folder] = [config.parent for config in ASSETS.rglob("config.json")]
    rows = harness.fixture()["documents"] if check else documents()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    lm = HFLM(pretrained=model.eval(), tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = local_tasks.write_tasks(Path(temporary), harness.TASKS, rows)
        results = {task: local_tasks.evaluate(lm, folder, task) for task in harness.TASKS}
    for one in results.values():
        del one["seconds"], one["cpu_seconds"]
    results = json.loads(json.dumps(results))
    if check:
        print(f"{harness.FIXTURE.name} agrees; largest difference {compare(harness.fixture()['results'], results):.1e}")
        return
    versions = {"lm_eval": lm_eval.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
                "documents": f"of Python {sys.version.split()[0]}"}  # fmt: skip
    made = {"versions": versions, "documents": rows, "results": results}
    text = json.dumps(made, separators=(",", ":")).replace('},{"', '},\n{"').replace("],[", "],\n[")
    harness.FIXTURE.write_text(text + "\n")
    print(harness.FIXTURE.name, {task: (len(one["answers"]), one["metrics"]) for task, one in results.items()})


if __name__ == "__main__":
    main()

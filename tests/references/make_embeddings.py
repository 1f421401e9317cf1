"""Makes embeddings.npz: transformers' last hidden states (with torch), pooled, of two tiny models and the shipped one.

`--check` makes them again and compares.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.references import embeddings, tiny
from tests.references.make_shipped import ASSETS


def hidden_states(folder: Path, ids: list[int]) -> np.ndarray:
    """float32 [len(ids), hidden], behind the last norm."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixture instead of writing it")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    made = {}
    [shipped] = [config.parent for config in ASSETS.rglob("config.json")]
    with tempfile.TemporaryDirectory() as temporary:
        for name in embeddings.MODELS:
            folder = shipped if name == "shipped" else tiny.write_checkpoint(name, Path(temporary) / name)
            for number, ids in enumerate(embeddings.prompts(name)):
                states = hidden_states(folder, ids)
                made[f"{name} {number}"] = np.stack([states[-1], states.astype(np.float64).mean(0), states[0]])
    if check:
        old = np.load(embeddings.FIXTURE)
        assert set(old) == set(made), "other prompts"
        worst = max(float(np.abs(old[key] - made[key]).max()) for key in made)
        assert worst < 2e-5, f"hidden states differ by {worst:.1e}"
        print(f"{embeddings.FIXTURE.name} agrees; largest difference {worst:.1e}")
        return
    np.savez(embeddings.FIXTURE, **{key: rows.astype(np.float32) for key, rows in made.items()})
    print(f"{embeddings.FIXTURE.name}: {len(made)} prompts")


if __name__ == "__main__":
    main()

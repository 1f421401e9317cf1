"""What a decode step and a prompt take on many GPUs, computed: bytes from memory, operations, bytes over the links.

    python -m benchmarks.step_model

Rates of one H200 are this repository's own (README.md); the links' are NVIDIA's data sheets' (NVLink 4: 450 GB/s
each way a GPU, of which an all-reduce of 1 GiB was seen to use 361 on 8; ConnectX-7: 50 GB/s each way a GPU), the
times of small all-reduces are `benchmarks.collectives`' on two GPUs, and assumptions on more (see LATENCY).
"""

from dataclasses import dataclass

READ, PRODUCTS = 4.44e12 * 0.80, 690e12  # bytes/s that decode steps reach; operations/s that last at 700 W
NVLINK, NETWORK = 350e9, 45e9  # bytes/s each way of a GPU
LATENCY = {1: 0.0, 2: 8e-6, 4: 9e-6, 8: 10e-6}  # s, of a small all-reduce within a host
NETWORK_LATENCY = 25e-6  # s, of one between hosts
LAUNCHES = 9 * 1.5e-6  # s a layer: kernels that do not overlap


@dataclass(frozen=True)
class Model:
    """Sizes that decide a step; bytes in bfloat16."""

    name: str
    layers: int
    hidden: int
    kv_heads: int
    attention: float  # parameters of a layer's attention
    mlp: float  # of its MLP, or of one expert
    vocab: int
    experts: int = 1
    per_token: int = 1

    @property
    def kv_bytes(self) -> int:
        """Of one token in all layers, heads of 128."""
        return 2 * self.layers * self.kv_heads * 128 * 2

    @property
    def size(self) -> float:
        """Bytes of all weights."""
        layer = self.attention + self.mlp * self.experts
        return 2 * (self.layers * layer + 2 * self.vocab * self.hidden)

    def read(self, rows: int) -> float:
        """Bytes of weights that a step of so many rows reads: of the experts those that some row chose."""
        chosen = self.experts * (1 - (1 - self.per_token / self.experts) ** rows)
        return 2 * (self.layers * (self.attention + self.mlp * chosen) + self.vocab * self.hidden)

    @property
    def operations(self) -> float:
        """Of a token's products."""
        return 2 * (self.layers * (self.attention + self.mlp * self.per_token) + self.vocab * self.hidden)


def dense(name: str, layers: int, hidden: int, heads: int, inner: int, vocab: int) -> Model:
    return Model(name, layers, hidden, 8, hidden * 128 * (2 * heads + 16), 3 * hidden * inner, vocab)


MODELS = [
    dense("8B", 32, 4096, 32, 14336, 128256),
    dense("70B", 80, 8192, 64, 28672, 128256),
    Model("235B-A22B", 94, 4096, 4, 4096 * 128 * (2 * 64 + 8), 3 * 4096 * 1536, 151936, 128, 8),
]


@dataclass(frozen=True)
class Placement:
    """`tensor` GPUs split each layer, within a host when there are 8 or fewer; the rest are replicas or stages."""

    tensor: int
    stages: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.stages * self.data


def all_reduce(size: float, gpus: int) -> float:
    """Seconds: a ring within hosts of 8 and, beyond, one of each GPU's eighth between them."""
    inner = min(gpus, 8)
    seconds = LATENCY[inner] + 2 * (inner - 1) / inner * size / NVLINK
    hosts = gpus // inner
    if hosts > 1:
        seconds += NETWORK_LATENCY + 2 * (hosts - 1) / hosts * size / inner / NETWORK
    return seconds


def step_seconds(model: Model, place: Placement, rows: int, context: int) -> tuple[float, float, float]:
    """Of one token of each of `rows` sequences: all, in collectives, and bytes that a GPU sends within a layer.

    A replica has its share of the rows. With stages the rows are as many groups, each of which one stage computes
    while the others have theirs: a token passes all stages, and each stage reads its weights for each group.
    """
    rows = -(-rows // place.data)
    group = -(-rows // place.stages)
    kv_share = max(place.tensor / model.kv_heads, 1) / place.tensor  # of a sequence's KV that a GPU has
    reading = (model.read(group) / place.tensor + group * context * model.kv_bytes * kv_share) / READ
    computing = group * model.operations / place.tensor / PRODUCTS
    sent = group * model.hidden * 2
    links = 2 * model.layers * all_reduce(sent, place.tensor) if place.tensor > 1 else 0.0
    between = place.stages * (NETWORK_LATENCY + sent / NETWORK) if place.stages > 1 else 0.0
    whole = max(reading, computing) + model.layers * LAUNCHES + links + between
    return whole, links + between, 2 * 2 * (place.tensor - 1) / place.tensor * sent


def prompt_seconds(model: Model, place: Placement, tokens: int) -> tuple[float, float]:
    """Of one prompt on `tensor` GPUs, in one step: all, and in collectives."""
    links = 2 * model.layers * all_reduce(tokens * model.hidden * 2, place.tensor) if place.tensor > 1 else 0.0
    return tokens * model.operations / place.tensor / PRODUCTS + links, links


PLACES = [Placement(1), Placement(2), Placement(8), Placement(1, data=8), Placement(8, data=8), Placement(8, stages=8),
          Placement(64)]  # fmt: skip
MEMORY, HELD = 141e9, 0.92


def main() -> None:
    header = (
        "GPUs | placement | ms a token, 1 row | 64 rows | 1024 rows | tokens/s, 1024 rows | of it links"
        " | 8192 tokens, ms | of it links"
    )
    for model in MODELS:
        print(f"\n{model.name}, {model.size / 1e9:.0f} GB of weights, contexts of 2048\n\n| {header} |")
        print("| --- " * (header.count("|") + 1) + "|")
        for place in PLACES:
            share = max(place.tensor / model.kv_heads, 1) / place.tensor / place.stages
            held = model.size / place.tensor / place.stages
            if held + 1024 / place.data * 2048 * model.kv_bytes * share > HELD * MEMORY:
                continue
            times = [step_seconds(model, place, rows, 2048) for rows in (1, 64, 1024)]
            prompt, prompt_links = prompt_seconds(model, place, 8192)
            name = f"TP {place.tensor}" + (f" x DP {place.data}" if place.data > 1 else "")
            name += f" x {place.stages} stages" if place.stages > 1 else ""
            cells = [f"{whole * 1e3:.2f}" for whole, _, _ in times]
            cells += [f"{1024 / times[2][0]:,.0f}", f"{times[2][1] / times[2][0]:.0%}"]
            cells += [f"{prompt * 1e3:.0f}", f"{prompt_links / prompt:.0%}"]
            print(f"| {place.gpus} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""What a decode step and a prompt take on many GPUs, computed: bytes from memory, operations, bytes over the links.

    python -m benchmarks.step_model

Rates of one H200, and on two of small and large all-reduces and of sums over peers' memory, are this repository's own
(README.md). On 4 and 8 they are assumed to be as on two; between hosts the rate is ConnectX-7's data sheet's (50 GB/s
each way a GPU) less a tenth, the time of a small all-reduce an assumption. What it gives for measured cases stands
beside them in docs/sharding.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

READ, PRODUCTS = 3.9e12, 690e12  # bytes/s that decode steps reach; operations/s that last at 700 W
NVLINK, NETWORK = 220e9, 45e9  # bytes/s each way of a GPU
LATENCY, NETWORK_LATENCY = 21e-6, 30e-6  # s, of a small all-reduce within a host, and between hosts
PEERS, PEERS_BYTES = 10e-6, 2**22  # s, of a sum over peers within a step; most that a GPU sends (layers/peers.py)
LAUNCHES = 9 * 1.5e-6  # s a layer: kernels that do not overlap
STEPS_PER_CALL, PART = 4, 256  # of a pipeline: steps until it runs empty, tokens of a prompt at a time (assembly.py)


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


# Beside the weights of the first a host of 8 has little room; those of the second it has none for.
LARGER = [
    dense("405B", 126, 16384, 128, 53248, 128256),
    Model("686B-A31B (made up)", 60, 7168, 8, 7168 * 128 * (2 * 64 + 16), 3 * 7168 * 2048, 129280, 256, 8),
]


@dataclass(frozen=True)
class Placement:
    """`tensor` GPUs split each layer, within a host when there are 8 or fewer; the rest are replicas or stages, each
    of them within a host."""

    tensor: int
    stages: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.stages * self.data


def all_reduce(size: float, gpus: int) -> float:
    """Seconds: a ring within hosts of 8 and, beyond, one of each GPU's eighth between them."""
    inner = min(gpus, 8)
    seconds = LATENCY + 2 * (inner - 1) / inner * size / NVLINK
    hosts = gpus // inner
    if hosts > 1:
        seconds += NETWORK_LATENCY + 2 * (hosts - 1) / hosts * size / inner / NETWORK
    return seconds


def decode_sum(size: float, place: Placement) -> float:
    """Seconds of one of a decode step's sums: to all others at once where that is quicker."""
    sent = (place.tensor - 1) * size
    if place.tensor <= 8 and place.stages == 1 and sent <= PEERS_BYTES:
        return max(PEERS, sent / NVLINK)
    return all_reduce(size, place.tensor)


def step_seconds(model: Model, place: Placement, rows: int, context: int) -> tuple[float, float, float]:
    """Of one token of each of `rows` sequences: all, in collectives, and bytes that a GPU sends within a layer.

    A replica has its share of the rows. With stages the rows are as many groups, each of which one stage computes
    while the others have theirs: a token passes all stages, and each stage reads its weights, and the head, for each
    group. Between two calls the pipeline fills anew.
    """
    rows = -(-rows // place.data)
    group = -(-rows // place.stages)
    kv_share = max(place.tensor / model.kv_heads, 1) / place.tensor  # of a sequence's KV that a GPU has
    read = model.read(group) + 2 * (place.stages - 1) * model.vocab * model.hidden
    products = max(read / READ, group * model.operations / PRODUCTS) / place.tensor
    attention = group * context * model.kv_bytes * kv_share / READ
    sent = group * model.hidden * 2
    links = 2 * model.layers * decode_sum(sent, place) if place.tensor > 1 else 0.0
    between = place.stages * hand_on(sent) if place.stages > 1 else 0.0
    whole = products + attention + model.layers * LAUNCHES + links + between
    filling = 1 + (place.stages - 1) / (place.stages * STEPS_PER_CALL)
    return filling * whole, filling * (links + between), 2 * 2 * (place.tensor - 1) / place.tensor * sent


def hand_on(size: float) -> float:
    """Seconds, from a stage to the next: each GPU to one of the other host's."""
    return NETWORK_LATENCY + size / NETWORK


def prompt_seconds(model: Model, place: Placement, tokens: int) -> tuple[float, float]:
    """Of one prompt in one step, on the GPUs of a replica: all, and in collectives. Stages have it in parts."""
    part = min(tokens, PART * model.experts // model.per_token) if place.stages > 1 else tokens
    ticks, layers, sent = tokens / part + place.stages - 1, model.layers / place.stages, part * model.hidden * 2
    links = ticks * 2 * layers * all_reduce(sent, place.tensor) if place.tensor > 1 else 0.0
    if place.stages > 1:  # at the end all stages are given the result
        rounds = 2 * (place.stages - 1) / place.stages
        links += ticks * hand_on(sent) + NETWORK_LATENCY + rounds * tokens * model.hidden * 2 / NETWORK
    products = max(part * model.operations / PRODUCTS, model.read(part) / READ) / place.tensor / place.stages
    return ticks * products + links, links


PLACES = [
    Placement(1), Placement(2), Placement(8), Placement(1, data=8), Placement(8, data=8), Placement(8, stages=8),
    Placement(64),
]  # fmt: skip
TWO_HOSTS = [Placement(8, data=2), Placement(8, stages=2), Placement(16)]
MEMORY, CONTEXT = 141e9 * 0.92, 2048


def fits(model: Model, place: Placement, rows: int) -> bool:
    """Whether a GPU has room for its weights, and for its part of the KV of so many rows."""
    share = max(place.tensor / model.kv_heads, 1) / place.tensor / place.stages / place.data
    return model.size / place.tensor / place.stages + rows * CONTEXT * model.kv_bytes * share < MEMORY


def main() -> None:
    table(MODELS, PLACES)
    table([*MODELS, *LARGER], TWO_HOSTS)


def table(models: Sequence[Model], places: Sequence[Placement]) -> None:
    counts = (1, 64, 1024)
    header = "GPUs | placement | " + " | ".join(f"{rows} rows, ms" for rows in counts)
    header += " | links' part of the last | 8192 tokens, ms | links' part"
    for model in models:
        print(f"\n{model.name}, {model.size / 1e9:.0f} GB of weights, contexts of {CONTEXT}\n\n| {header} |")
        print("| --- " * (header.count("|") + 1) + "|")
        for place in places:
            rooms = [rows for rows in counts if fits(model, place, rows)]
            if not rooms:
                continue
            times = [step_seconds(model, place, rows, CONTEXT) for rows in rooms]
            prompt, prompt_links = prompt_seconds(model, place, 8192)
            name = f"TP {place.tensor}" + (f" x DP {place.data}" if place.data > 1 else "")
            name += f" x {place.stages} stages" if place.stages > 1 else ""
            cells = [f"{whole * 1e3:.2f}" for whole, _, _ in times] + ["no room"] * (len(counts) - len(rooms))
            cells += [f"{times[-1][1] / times[-1][0]:.0%}", f"{prompt * 1e3:.0f}", f"{prompt_links / prompt:.0%}"]
            print(f"| {place.gpus} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

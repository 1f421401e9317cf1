"""How the work of `decode_layer` is cut."""

from dataclasses import dataclass
from functools import cached_property

ROWS = 8  # that every array of a step has, and a product has room for
KEYS = 64  # in a tile of attention
SHARED_BYTES = 225 * 1024
OUT, GATE_UP, DOWN, QKV = PRODUCTS = range(4)
MOST_PARTS = 16  # of a row's keys
COUNTERS = 4096


@dataclass(frozen=True)
class Plan:
    """Shapes, and how the work is cut. ValueError for what the kernel does not take."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    page_size: int
    normed: bool  # q and k
    eps: float
    scale: float
    programs: int = 128  # one a multiprocessor, all at once: they wait for one another
    columns: int = 128  # of a weight in a unit of work
    depth: int = 128  # and rows
    kv_stages: int = 2
    flight: int = 2  # units under way at a time, which cover the latency: a full memory pipe delays the counters

    def __post_init__(self) -> None:
        units = [self.tiles(p) * self.blocks(p) for p in PRODUCTS]
        whole = all(k % self.depth == 0 and n % self.columns == 0 for k, n in self.shapes)
        if (
            not whole
            or min(units) < self.programs
            or self.columns % 128
            or self.depth % 128
            or self.dim not in (64, 128)
            or self.heads % self.kv_heads
            or self.group > 64
            or self.first_counter(len(PRODUCTS)) > COUNTERS
            or KEYS % self.page_size
            or self.page_size % 8
            or not 0 < self.flight <= self.stages
        ):
            raise ValueError(f"not for this kernel: {self}, with {units} units of its products")

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of o, gate and up, down, and q, k and v."""
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        return (q, self.hidden), (self.hidden, 2 * self.inner), (self.inner, self.hidden), (self.hidden, q + 2 * kv)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def most_items(self) -> int:
        """Of attention: a part of the keys of a row and KV head."""
        return max(self.programs, ROWS * self.kv_heads)

    @property
    def stages(self) -> int:
        unit = 2 * self.depth * (self.columns + ROWS)
        return (SHARED_BYTES - 8 * 1024 - 4 * self.kv_stages * KEYS * self.dim) // unit

    def tiles(self, p: int) -> int:
        return self.shapes[p][1] // self.columns

    def blocks(self, p: int) -> int:
        return self.shapes[p][0] // self.depth

    def width(self, p: int) -> int:
        """Columns of the output of a tile: gate and up make one."""
        return self.columns // 2 if p == GATE_UP else self.columns

    def others(self, p: int) -> int:
        """Programs that have a part of a tile beside the one that has its start, at most."""
        units, blocks = self.tiles(p) * self.blocks(p), self.blocks(p)
        owner = [((unit + 1) * self.programs - 1) // units for unit in range(units)]
        return max(owner[(tile + 1) * blocks - 1] - owner[tile * blocks] for tile in range(self.tiles(p)))

    def first_counter(self, p: int) -> int:
        """Of the tiles of a product, after one for each product and those of attention's rows and heads."""
        return len(PRODUCTS) + ROWS * self.kv_heads + sum(map(self.tiles, range(p)))

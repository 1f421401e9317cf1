"""What compiled programs say of themselves: the memory they need, and whether they copy the KV cache."""

import math
import re
from functools import partial

import jax

# The shape of what is copied, or a tuple with it. Only from a line's start: those of kernels in Mosaic are a megabyte.
MOVES = re.compile(r"(?:ROOT )?\S+ = (.*?) (?:copy|copy-start|transpose|convert|bitcast-convert)\(")


def pool_copies(program, cache):
    """The lines of the optimized HLO, inside fusions too, that copy as many values as some layer's K or V has."""
    sizes = {pool.size for pool in jax.tree.leaves(cache)}
    lines = [(line, MOVES.match(line)) for line in map(str.strip, program.as_text().splitlines())]
    return [
        line
        for line, found in lines
        if found and sizes & {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", found[1])}
    ]


def compile_undonated(runner, name):
    """A program of this name as it would be if no argument were donated."""
    key = next(key for other, key in runner._all_keys() if other == name)
    return jax.jit(partial(getattr(runner._device_steps(), name), *key)).lower(*runner._arguments(name, key)).compile()


def check_memory(runner):
    """Every program of a warm runner needs at most what was planned."""
    assert set(runner._programs) == {(name, *key) for name, key in runner._all_keys()}
    needs = [program.memory_analysis().temp_size_in_bytes for program in runner._programs.values()]
    assert 0 < max(needs) <= runner.temporary_bytes, (max(needs), runner.temporary_bytes)


def check_no_pool_copies(runner):
    steps = {key: program for key, program in runner._programs.items() if key[0] in ("decode", "mixed")}
    assert {key[0] for key in steps} == {"decode", "mixed"}
    assert len({key[1].steps for key in steps}) == 2, "one step a call and several"
    copies = {key: lines for key, program in steps.items() if (lines := pool_copies(program, runner._cache))}
    assert not copies, copies

"""Two processes, one compilation cache: what the second one still compiles."""

import json
import subprocess
import sys

CHILD = """
import json, sys
from collections import Counter
import jax.monitoring

events = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: events.update([event]))
from jaxengine import LLM, SamplingParams
from jaxengine.engine.runner import Runner

lower, lowered = Runner._lower, []
Runner._lower = lambda self, name, *rest: (lowered.append(name), lower(self, name, *rest))[1]
model, options = json.loads(sys.argv[1])
with LLM(model, **options) as llm:
    llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    ahead = llm._runner._compiler.waiting.values()  # counted too
    print(json.dumps({
        "failed": [repr(e) for future in ahead if (e := future.exception())],
        "attention": llm._runner.attention,
        "programs": sorted({name for name, *_ in llm._runner._programs}),
        "lowered": lowered,
        "pages": list(llm._runner.num_pages),
        "compilations": events["/jax/core/compile/backend_compile_duration"],  # those found in the cache included
        "requests": events["/jax/compilation_cache/compile_requests_use_cache"],
        "hits": events["/jax/compilation_cache/cache_hits"],
        "misses": events["/jax/compilation_cache/cache_misses"],
    }))
"""


def start(model, cache, **options):
    """A short generate in a process of its own; what it counted."""
    arguments = json.dumps([str(model), options | {"compilation_cache": str(cache)}])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_second_process_compiles_nothing(model, cache, attention, *, stored: bool, **options):
    """`stored`: the engine's own programs need not be lowered either."""
    first, second = (start(model, cache, attention=attention, **options) for _ in range(2))
    assert first["attention"] == attention
    assert first["failed"] == second["failed"] == []
    assert {"mixed", "head", "decode", "write_slots"} <= set(first["programs"])
    assert first["misses"] > len(first["programs"]), first
    assert (second["programs"], second["pages"]) == (first["programs"], first["pages"]), (first, second)
    assert set(first["lowered"]) >= set(first["programs"]), first
    assert second["lowered"] == ([] if stored else first["lowered"]), second
    assert second["misses"] == 0, second
    assert second["hits"] == second["requests"] == second["compilations"] >= len(second["lowered"]), second

"""Steps that take as long as a test of what happens meanwhile needs."""

import threading
import time
from contextlib import contextmanager

from jaxengine import live_weights


@contextmanager
def slowed(llm, seconds=0.005):
    """Steps that take so long that a request of many tokens is still in flight when the test comes to it.

    They wait while weights are loaded, which a busy machine may take any time for.
    """
    submit, load, loaded = llm._runner.submit, live_weights.load_prepared, threading.Event()

    def slow_submit(inputs):
        time.sleep(seconds)
        loaded.wait()
        return submit(inputs)

    def load_alone(*arguments, **options):
        loaded.clear()
        try:
            return load(*arguments, **options)
        finally:
            loaded.set()

    loaded.set()
    llm._runner.submit, live_weights.load_prepared = slow_submit, load_alone
    try:
        yield
    finally:
        llm._runner.submit, live_weights.load_prepared = submit, load

"""What the tests of weights share."""

import json

import numpy as np


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def assert_same(params, other):
    assert set(params) == set(other)
    for path, array in params.items():
        assert array.dtype == other[path].dtype
        assert array.sharding == other[path].sharding
        np.testing.assert_array_equal(array, other[path], err_msg=path)

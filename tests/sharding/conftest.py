"""jax warns of its Triton backend at every lowering; the kernels stand on it knowingly."""


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

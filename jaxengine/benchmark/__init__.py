"""What `jaxengine bench` measures, one file a command: serving (latency, throughput), kernels, startup, load."""

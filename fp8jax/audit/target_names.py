"""The names of the devices that targets.py can find; this module imports no JAX."""

GPUS = ("h100", "h200", "b200")
# Name → libtpu's name of the generation, dimensions of a topology, chips of the host-sized one.
TPUS = {"tpu-v5p": ("v5p", 3), "tpu-v6e": ("v6e", 2), "tpu7x": ("tpu7x", 3)}
FORMS = (
    "h100:8",
    "h100:64x8 (nodes x GPUs)",
    "h200:8",
    "b200:8",
    "tpu-v5p:4",
    "tpu-v6e:8",
    "tpu7x:4 (chips)",
    "tpu7x:2x2x1",
    "local",
)
KINDS = ("local", *GPUS, *TPUS)

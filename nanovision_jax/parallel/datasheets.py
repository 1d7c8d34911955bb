"""What makers say of their devices, those that are not at hand too. No jax is imported here."""

# Dense bf16 matrix products, FLOP/s per device, from the makers' data sheets. Device kinds as jax names them.
PEAK = {
    'A100': 312e12,
    'H100': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'GH200': 989e12,
    'H200': 989e12,
    'B200': 2250e12,
    'L4': 121e12,
    'L40S': 362e12,
    'T4': 65e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
}

GPU_SHARE = 0.75  # of a GPU's memory that XLA takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
# GiB that a program may take. Kinds as jax names them.
MEMORY = {
    'TPU v5 lite': 15.75,
    'TPU v6 lite': 31.25,
    'NVIDIA A100-SXM4-80GB': GPU_SHARE * 79.1,
    'NVIDIA H100 80GB HBM3': GPU_SHARE * 79.1,
}

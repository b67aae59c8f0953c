"""The GPU kernels as compiled code, without a GPU."""

"""The GPU kernels, in Triton. Every kernel also runs in Triton's interpreter (TRITON_INTERPRET=1)."""

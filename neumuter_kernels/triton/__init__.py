"""The GPU kernels in Triton, and their launch. They also run in Triton's interpreter (TRITON_INTERPRET=1)."""

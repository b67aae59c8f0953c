"""``python -m neumuter_kernels``: what is installed, and which backend each op uses."""

from neumuter_kernels.info import report

if __name__ == "__main__":
    for what, value in report():
        print(f"{what:18} {value}")

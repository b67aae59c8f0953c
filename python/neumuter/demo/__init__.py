"""The whole job on made-up records: train a small model, make it forget twelve of them, measure."""

from neumuter.demo.run import run_demo
from neumuter.demo.tutorial import write_tutorial

__all__ = ["run_demo", "write_tutorial"]

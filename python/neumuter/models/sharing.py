"""Which parameters of a model lie in the same memory."""

from torch import Tensor, nn

from neumuter.models.families import unwrapped


class Sharing:
    """The parameters of ``model``, and where each lies."""

    def __init__(self, model: nn.Module) -> None:
        model = unwrapped(model)
        self._memory = {n: _memory(p) for n, p in model.named_parameters(remove_duplicate=False)}
        self._paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(path)

    def names(self, module: nn.Module, name: str) -> list[str]:
        """Name the parameter ``name`` of ``module`` in the model, once for each place of the module."""
        return [f"{path}.{name}".lstrip(".") for path in self._paths[module]]

    def others(self, module: nn.Module, name: str) -> list[str]:
        """Name the parameters of other modules that share memory with ``name`` of ``module``."""
        own = self.names(module, name)
        begin, end = self._memory[own[0]]
        return [n for n, (b, e) in self._memory.items() if b < end and begin < e and n not in own]


def _memory(parameter: Tensor) -> tuple[int, int]:
    """Find the first address and the one behind the last; without one, as on the meta device, its id."""
    if parameter.is_meta or type(parameter) is not nn.Parameter:
        return id(parameter), id(parameter) + 1
    begin = parameter.data_ptr()
    steps = ((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return begin, begin + (sum(steps) + 1) * parameter.element_size() if parameter.numel() else begin

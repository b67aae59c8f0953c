"""The self-check of a worker: before the first request, muting must be seen where it has to be.

Each layer: with a set, a token's output is that of the layer with the gains folded into its weights, and the
token beside it is as before. The engine, compiled and captured: with the set, two tokens come out changed.
"""

import math
from typing import Any

import torch

from neumuter.integrations.vllm.rows import Rows
from neumuter.integrations.vllm.stamp import NO_SET, STAMP
from neumuter.mutes.mute_set import MutedLayer

# What stands for the bytes of the set that the checks use.
CHECK = b"check"
# A request of two tokens takes two steps, and a few more where steps overlap.
MOST_STEPS = 20
# How much more than the noise between two equal requests the set must change the output.
ABOVE_NOISE = 10.0


def check_layer(
    path: str,
    down: Any,
    layer: MutedLayer | None,
    rows: Rows,
    shard: Any,
    place: tuple[Any, Any],
    tolerance: float,
) -> None:
    """Check one down projection, on two tokens of which the first is muted.

    Args:
        path: of the FFN. down: its ``Down``.
        layer: the neurons of ``shard``, the set, that this worker holds of it.
        rows: of the worker.
        place: (device, dtype).
        tolerance: of the distance from the folded layer, relative to the change.

    Raises:
        RuntimeError: the outputs are not as they must be.
    """
    if layer is None:
        return
    width = down.stop - down.start
    hidden = torch.randn(2, width).to(*place)
    neurons = layer.indices.long()
    # Column f of the weight is what the layer makes of neuron f alone.
    alone = torch.zeros(len(neurons) + 1, width).index_put(
        (torch.arange(len(neurons)), neurons), torch.tensor(1.0)
    )
    outputs = down.apply(down.linear, alone.to(*place), None).double()
    columns = outputs[:-1] - outputs[-1]
    untouched = down.apply(down.linear, hidden.clone(), None).double()
    change = ((layer.gains - 1) * hidden[0, neurons].cpu().float()).double().to(columns.device) @ columns
    rows.choose([shard, None], [1, 1])
    muted = down.linear.quant_method.apply(down.linear, hidden.clone(), None).double()
    allowed = tolerance * change.norm()
    far, moved = (muted[0] - untouched[0] - change).norm(), (muted[1] - untouched[1]).norm()
    if not (change.norm() > 0 and far <= allowed and moved <= allowed):
        raise RuntimeError(
            f"mute sets do not work in {path}: a muted token is {far:.3g} from that of the folded layer, an "
            f"unmuted one {moved:.3g} from what it was, where {allowed:.3g} may be rounding"
        )


def check_engine(core: Any) -> None:
    """Check a whole ``EngineCore`` with requests of its own, which use ``CHECK`` or no set.

    Raises:
        RuntimeError: a set does not change what comes out.
    """
    first, again, muted = (
        _generate(core, number, data) for number, data in enumerate((NO_SET, NO_SET, CHECK))
    )
    noise, change = _distance(first, again), _distance(first, muted)
    if not (math.isfinite(noise) and change > ABOVE_NOISE * noise):
        raise RuntimeError(
            "mute sets do not reach the output of the model as vLLM runs it: with a set, log-probabilities "
            f"change by {change:.3g}, without one by {noise:.3g}"
        )


def _generate(core: Any, number: int, data: bytes) -> list[tuple[int, float]]:
    """Two tokens and their log-probabilities, by way of vLLM's scheduler and workers."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    name, vocabulary = f"neumuter-check-{number}", core.vllm_config.model_config.get_vocab_size()
    params = SamplingParams(
        temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=1, extra_args={STAMP: data}
    )
    request, _ = core.preprocess_add_request(
        EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[vocabulary // 4, vocabulary // 2, vocabulary // 3],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=name,
            data_parallel_rank=None,
        )
    )
    core.scheduler.add_request(request)
    found: list[tuple[int, float]] = []
    for _ in range(MOST_STEPS):
        if not core.scheduler.has_requests() and not core.batch_queue:
            return found
        outputs, _ = core.step_fn()
        for part in (outputs or {}).values():
            for output in part.outputs:
                scores = output.new_logprobs.logprobs
                found += [
                    (token, float(row[0])) for token, row in zip(output.new_token_ids, scores, strict=True)
                ]
    raise RuntimeError(f"vLLM has not finished a request of two tokens after {MOST_STEPS} steps")


def _distance(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> float:
    """The largest distance of log-probabilities; infinite between other tokens."""
    if [token for token, _ in one] != [token for token, _ in other] or len(one) != 2:
        return math.inf
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))

"""One engine, run by the Python of an environment with vLLM: reads [sets, first], says tokens a second."""

import json
import sys
import time


def main(options, model, folder, requests, prompt, new):
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    engine = vllm.LLM(
        model=model, dtype="float32", max_model_len=256, max_num_seqs=requests, skip_tokenizer_init=True,
        enable_prefix_caching=False, enforce_eager=True, **options,
    )  # fmt: skip
    print("ENGINE", json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}), flush=True)
    ids = [[(7 * i + 13 * j) % 1000 + 10 for j in range(prompt)] for i in range(requests)]
    prompts = [{"prompt_token_ids": one} for one in ids]
    for line in sys.stdin:
        sets, first = json.loads(line)
        numbers = [(first + i) % sets if sets else None for i in range(requests)]
        adapters = None
        if "enable_lora" in options:
            adapters = [LoRARequest(f"a{n}", n + 1, f"{folder}/adapter{n}") for n in numbers]
            numbers = [None] * requests
        params = [
            vllm.SamplingParams(
                temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
                extra_args=None if number is None else {"mute_set": f"s{number}"},
            )
            for number in numbers
        ]  # fmt: skip
        start = time.perf_counter()
        found = engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(one.outputs[0].token_ids) == new for one in found)
        print("ENGINE", json.dumps(requests * new / seconds), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:7]))

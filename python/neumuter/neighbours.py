"""Neighbour texts, which keep the rest of the model in place, when the user has none to give."""

import torch

BATCH = 8


def sample_texts(model, tokenizer, count, length, seed=0, callback=None):
    """At most ``count`` texts (str) of up to ``length`` new tokens, drawn from the model itself.

    Sampling is from the whole distribution, after the start token (bos, else eos), and seeded; texts of
    less than two tokens are dropped. ``callback(done, total)`` after each batch. They stand for what the
    model says most readily, so rarer knowledge is protected less than by texts of one's own.

    Raises ValueError if the tokenizer has no start token, or if no text came out.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has no bos or eos token to sample neighbours from; give retain texts")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    texts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for done in range(0, count, BATCH):
            prompt = torch.full((min(BATCH, count - done), 1), start, device=model.device)
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                min_new_tokens=min(2, length),
                pad_token_id=padding,
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
            if callback:
                callback(done + len(prompt), count)
    texts = [text for text in texts if len(tokenizer(text)["input_ids"]) > 1]
    if not texts:
        raise ValueError("the model gave no text when sampled from; give retain texts")
    return texts

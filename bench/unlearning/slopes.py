"""SLOPES: how many requests slopes hold down, and what can be read from a file of them.

The first: fifty customers of the demo's model, which has learned those of sixty-two, ask one by one. The
second: an attacker has the model, the slopes of a request, and the prompt. A guess is put in the place of the
secret, its slopes are measured under the same gains, and compared with those in the file by their cosine.
"""

import dataclasses
import functools
import itertools
import random
import string

import torch

import neumuter
from bench.unlearning.requests import find_outcome, measure_sets
from bench.unlearning.synth import Setting
from neumuter.demo import task
from neumuter.demo.model import Training
from neumuter.recipes.slopes import find_slopes
from neumuter.training.batches import PairedBatches
from neumuter.training.losses import begin_runs
from neumuter.training.neurons import Neurons

SEEDS = (211, 223, 241)
# Requests, those after which is measured, and customers who stay.
MANY, EVERY, STAYING = 50, 10, 12
TRAINING = Training(steps=600)
# The demo has 576 names. After so many, middle initials make more of them.
NAMES = 480
READ, GUESSES = 3, 100
# How often an attacker goes through the digits of a number.
ROUNDS = 2


def cases(quick=False):
    """Yields a case per so many requests, and one for each text that is read."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _read_cases(seed, 1 if quick else READ)
    yield from _many_cases(SEEDS[0], 2 if quick else MANY, 1 if quick else EVERY)


def _many_cases(seed, count, every):
    setting = functools.cache(lambda: Setting("gated, 0.9 M", seed, count, make_crowd(seed, count), TRAINING))
    outcomes = []

    def ask():
        """One more request."""
        asked = len(outcomes)
        sets, known = [outcomes[-1].mutes] if outcomes else [], [outcome.slopes for outcome in outcomes]
        outcomes.append(find_outcome(setting(), [asked], range(asked), sets, known, True))

    def find(asked):
        while len(outcomes) < asked:
            ask()
        sets = [outcome.mutes for outcome in outcomes[-1:]] if asked else []
        return measure_sets(setting(), count, range(asked), sets)

    for asked in range(0, count + 1, every):
        yield {"seed": seed, "what": "many", "requests": asked}, functools.partial(find, asked)


def make_crowd(seed, count, staying=STAYING):
    """Records of ``count`` customers to forget and others to keep, from the demo's by several seeds."""
    found, made = {}, task.make_records(seed)
    for turn in itertools.count(1):
        for record in made.forget + made.retain_same:
            record = _add_initial(record, len(found) // NAMES)
            found.setdefault(record.prompt, record)
        if len(found) >= count + staying:
            break
        made = task.make_records(seed + 1000 * turn)
    people = list(found.values())[: count + staying]
    return task.Records(people[:count], people[count:], made.retain_other)


def _add_initial(record, which):
    """The record of a customer with a middle initial; ``which`` 0: without one."""
    if not which:
        return record
    customer, last, mail = record.prompt.rsplit(" ", 2)
    prompt = f"{customer} {string.ascii_uppercase[which - 1]}. {last} {mail}"
    return dataclasses.replace(record, prompt=prompt)


def _read_cases(seed, count):
    setting = functools.cache(lambda: Setting("gated, 0.9 M", seed))
    for number in range(count):

        def find(number=number):
            slopes = find_outcome(setting(), [number], [], [], keep=True).slopes
            return read(setting(), slopes, setting().forget[number], seed)

        yield {"seed": seed, "what": "read", "request": number}, find


def read(setting, slopes, record, seed):
    """{"guessed": the true secrets come first among random ones, "read": the phone number is read off}."""
    rng = random.Random(seed)
    lengths = [len(secret) for secret in record.secrets]
    alphabets = (string.ascii_lowercase + string.digits, string.digits)
    others = [
        tuple("".join(rng.choices(a, k=n)) for a, n in zip(alphabets, lengths, strict=True))
        for _ in range(GUESSES - 1)
    ]
    likeness = _likeness(setting, slopes, [_with(record, guess) for guess in (record.secrets, *others)])
    number = record.secrets[1]
    known = "0" * len(number)
    for place in [*range(len(number))] * ROUNDS:
        guesses = [known[:place] + digit + known[place + 1 :] for digit in string.digits]
        found = _likeness(setting, slopes, [_with(record, (record.secrets[0], guess)) for guess in guesses])
        known = guesses[int(found.argmax())]
    return {"guessed": float(likeness.argmax() == 0), "read": float(known == number)}


def _with(record, secrets):
    text = record.continuation
    for old, new in zip(record.secrets, secrets, strict=True):
        text = text.replace(old, new)
    return dataclasses.replace(record, continuation=text, secrets=secrets)


def _likeness(setting, slopes, records):
    """The cosine of the slopes of each record with those in the file; −1 where it has more or fewer runs."""
    batch = setting.encode(records, "secret")
    found = []
    with neumuter.attach(setting.full, start_layer=0) as masked:
        pair, neurons = PairedBatches(masked, batch, batch), Neurons(masked)
        ids = neurons.places(slopes.at)
        gates = torch.cat(list(neurons.masks(slopes.at).values()))
        for sample in range(len(records)):
            places = begin_runs(pair.runs_of(sample)).nonzero().flatten().tolist()
            if len(places) != len(slopes.log_odds):
                found.append(torch.tensor(-1.0))
                continue
            parts = find_slopes(pair, neurons, gates, sample, places)
            values = torch.cat([part[:, ids] for _, part in parts])
            found.append(torch.cosine_similarity(values.flatten(), slopes.values.flatten(), 0))
    return torch.stack(found)

"""What the commands of the command line do with models and texts, with their progress shown.

Heavy imports are inside the functions, as in ``neumuter.cli.app``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neumuter.report.console import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neumuter.mutes.mute_set import MuteSet
    from neumuter.types import Batch, Text

SHARDS = ("model.safetensors", "model.safetensors.index.json")
SHOWN, SHOWN_TOKENS = 4, 64  # texts in the report, and tokens of each
SAMPLES = 32  # neighbour texts said by the model itself: so many alone, half as many beside a retain file


def load(model: str, dtype: str, gguf_file: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(model)
    if not path.exists() and (path.is_absolute() or model.startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"no such folder: {model}")  # before it is looked for on the Hub
    with console.status("Importing transformers"):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
    with console.status(f"Loading {escape(model)}"), _one_message(model):
        where: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)
        if gguf_file and hasattr(transformers, "GgufConfig"):  # older versions always unpack the weights
            where["quantization_config"] = transformers.GgufConfig(dequantize=True)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, trust_remote_code=False, **where
        )
        if gguf_file and getattr(network, "hf_quantizer", None) is not None:
            network.hf_quantizer.remove_quantization_config(network)  # the weights are ordinary ones now
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@contextmanager
def _one_message(model: str) -> Iterator[None]:
    """Raises what a damaged or hostile checkpoint makes transformers raise as a ValueError of one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError):
        raise
    except Exception as error:  # of safetensors, of unpickling
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{model} cannot be loaded: {type(error).__name__}: {reason}") from error


@contextmanager
def progress_bar(description: str, total: int | None, *fields: str) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left; yields advance(step, total, **fields), each field a str."""
    columns = [TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields]
    left = TimeRemainingColumn()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns, left, console=console
    ) as bars:
        unknown: dict[str, Any] = dict.fromkeys(fields, "–")
        task = bars.add_task(description, total=total, **unknown)
        yield lambda step, total, **values: bars.update(task, completed=step, total=total, **values)


def batches_of(
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Path | None],
    column: str | None,
    length: int,
    limit: int | None,
) -> dict[str, Batch]:
    from neumuter.texts import encode, read_texts

    given = {name: file for name, file in files.items() if file}
    return {n: encode(read_texts(file, column, limit), tokenizer, length) for n, file in given.items()}


def rewritten(texts: Sequence[Text], model: str, seed: int, out: Path) -> Sequence[Text]:
    """Neighbours by a masked language model, kept in the folder ``out``."""
    import torch
    import transformers

    from neumuter.texts.neighbours import cached, rewrite_texts

    def make() -> Sequence[Text]:
        with console.status(f"Loading {escape(model)}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            network = transformers.AutoModelForMaskedLM.from_pretrained(model, trust_remote_code=False).eval()
        network = network.to("cuda" if torch.cuda.is_available() else "cpu")
        with progress_bar("Rewriting texts", len(texts)) as advance:
            return rewrite_texts(texts, network, tokenizer, seed=seed, callback=advance)

    return cached(out, {"texts": texts, "model": model, "seed": seed}, make)


def sampled(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget_batch: Batch,
    others: Sequence[Text],
    former: MuteSet | None,
    seed: int,
    out: Path,
) -> Sequence[Text]:
    """Neighbours that the model itself says, kept in the folder ``out``; ``others``: those that there are.

    ``former``: the mute set that is in force, whose texts the model does not say.
    """
    from neumuter.models.families import find_ffns
    from neumuter.mutes.fingerprint import fingerprint
    from neumuter.texts.neighbours import cached, sample_texts

    if others and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        console.print("This tokenizer has no start token, so the model is not sampled from.")
        return []
    if not others:
        console.print(
            "No --retain file: the neighbours are texts sampled from the model itself. What the model "
            "knows beside the forget texts is protected less well that way."
        )
    count, length = SAMPLES // (2 if others else 1), forget_batch["labels"].shape[1]

    def make() -> list[str]:
        with progress_bar("Sampling neighbours", count) as advance:
            return sample_texts(network, tokenizer, count, length, seed, advance, barred=forget_batch)

    barred = {name: forget_batch[name].tolist() for name in ("input_ids", "labels")}
    in_force = former and {path: (i.tolist(), g.tolist()) for path, (i, g) in former.layers.items()}
    weights = [fingerprint(find_ffns(network), {}), in_force]
    return cached(out, {"barred": barred, "model": weights, "count": count, "seed": seed}, make)


def measure(description: str, network: PreTrainedModel, forget: Batch, retain: Batch) -> dict[str, float]:
    """MA of the forget batch, and the mean token loss of both, in nats."""
    from neumuter.evaluation import mean_token_loss, memorization_accuracy

    with console.status(description):
        return {
            "forget_loss": mean_token_loss(network, forget),
            "forget_ma": memorization_accuracy(network, forget),
            "retain_loss": mean_token_loss(network, retain),
        }


def continued(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    state: str,
    samples: list[dict[str, str]] | None = None,
) -> list[dict[str, str]]:
    """The first texts, dicts of "prompt", "truth" and, under the key ``state``, what greedy decoding says."""
    import torch

    if samples is None:
        samples = []
        for text in texts[:SHOWN]:
            prompt, truth = (
                (text[: len(text) // 3], text[len(text) // 3 :]) if isinstance(text, str) else text
            )
            samples.append({"prompt": prompt, "truth": truth})
    for sample in samples:
        ids = tokenizer(sample["prompt"], return_tensors="pt", truncation=True)["input_ids"].to(
            network.device
        )
        if not ids.shape[1]:
            continue
        wanted = len(tokenizer(sample["truth"], add_special_tokens=False)["input_ids"])
        made = cast(Any, network).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max(wanted, 1), SHOWN_TOKENS),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        sample[state] = cast(str, tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return samples


def measure_tofu(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Path | None],
    limit: int | None,
    reference: Mapping[str, Any] | None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    import torch

    from neumuter.evaluation import tofu, tofu_metrics

    sets = {name: tofu.read_questions(file, limit) for name, file in files.items() if file}
    if reference and "truth_ratios" not in reference:
        raise ValueError("--retrained is a report of another suite than tofu")
    ratios = torch.tensor(reference["truth_ratios"], dtype=torch.float64) if reference else None
    metrics, ratios = tofu_metrics(network, tokenizer, sets, ratios)
    return metrics, {"truth_ratios": ratios.tolist()}


def union_of(network: PreTrainedModel, paths: Sequence[Path]) -> MuteSet:
    """The mute set of a file, or of several together."""
    from neumuter.mutes.algebra import combine
    from neumuter.mutes.mute_set import MuteSet

    sets = [MuteSet.load(path) for path in paths]
    return sets[0] if len(sets) == 1 else combine(network, sets)


def fold_files(model: str, files: Sequence[Path], out: Path, gguf_file: str | None) -> MuteSet:
    """Fold into a copy of the checkpoint: on disk where that is possible, else through a loaded model."""
    from neumuter.files import new_folder
    from neumuter.mutes.mute_set import MuteSet
    from neumuter.serving.fold import fold
    from neumuter.serving.fold_checkpoint import CARD, NotOnDiskError, fold_checkpoint, model_card

    if len(files) == 1 and not gguf_file and any((Path(model) / name).is_file() for name in SHARDS):
        mutes = MuteSet.load(files[0])
        with suppress(NotOnDiskError), progress_bar("Folding, bytes", None) as advance:
            fold_checkpoint(model, mutes, out, callback=advance)
            return mutes
    with new_folder(out) as temporary:
        network, tokenizer = load(model, "auto", gguf_file)
        mutes = union_of(network, files)
        fold(network, mutes)
        with console.status("Saving the checkpoint"):
            network.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / CARD).write_text(model_card(mutes), encoding="utf-8")
    return mutes

"""Whether a model is in a folder, on the Hugging Face Hub, or in its cache: found out at once."""

from pathlib import Path

import huggingface_hub

# Within this time the Hub says whether it has a model.
SECONDS_TO_ANSWER = 10.0


def find_model(model: str) -> bool:
    """Find out at once whether there is a model of that name; returns whether it must come from the cache.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub or in its cache.
    """
    path, missing = Path(model), f"no such folder: {model}"
    if path.exists():
        return False
    if path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(missing)
    try:
        cached = any(
            isinstance(huggingface_hub.try_to_load_from_cache(model, name), str)
            for name in ("config.json", "adapter_config.json")
        )
        huggingface_hub.HfApi().model_info(model, timeout=SECONDS_TO_ANSWER)
    except huggingface_hub.errors.HFValidationError:
        raise FileNotFoundError(missing) from None
    except huggingface_hub.errors.GatedRepoError:
        raise
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{missing}, nor a model of that name on the Hugging Face Hub, if it is not a private one"
        ) from None
    # What the Hub's client raises without a connection depends on its version.
    except Exception as error:
        if cached:
            return True
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{missing}. The Hugging Face Hub cannot be asked ({reason}), and its cache has no such model"
        ) from None
    return False

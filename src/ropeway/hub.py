"""From a model's name to a directory: the bundled model, a local directory, or a download from the hub."""

from __future__ import annotations

from pathlib import Path

from ropeway.errors import ModelError

BUNDLED = Path(__file__).parent / "bundled"
_SETTINGS = ("config.json", "generation_config.json", "model.safetensors.index.json", "modules.json",
             "*_Pooling/config.json", "sentence_bert_config.json")  # fmt: skip
_TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "chat_template.json", "additional_chat_templates/*.jinja")  # fmt: skip
# Not every safetensors file: some repositories hold a second copy of all weights in another layout.
_WEIGHTS = ("model*.safetensors",)


def locate(model: str, *, revision: str | None = None, download_dir: str | None = None, weights: bool = True) -> Path:
    """The directory of `model`: 'bundled', a path, or a hub name such as 'Qwen/Qwen3-0.6B'.

    A hub model is downloaded unless it is in the cache already; without `weights` only its settings and tokenizer are.
    One revision holds for all files. Raises ModelError.
    """
    if model == "bundled":
        if not (BUNDLED / "config.json").is_file():
            raise ModelError(f"The bundled model is not in this installation ({BUNDLED}). Name another model.")
        return BUNDLED
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{model} is a file. Give the directory that holds config.json and the safetensors files.")
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"The directory {model} does not exist. Check the path.")
    return _download(model, revision, download_dir, weights)


def tokenizer_directory(name: str, download_dir: str | None = None) -> Path:
    """The directory of the tokenizer `name`: a directory with nothing else will do, and a file tokenizer.json may be
    meant. Raises ModelError."""
    path = Path(name).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    return locate(name, download_dir=download_dir, weights=False)


def _download(model: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_SETTINGS, *_TEXT, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=patterns))
    except GatedRepoError:
        reason = "is gated. Accept its licence on the hub and log in with `hf auth login`."
    except RepositoryNotFoundError:
        reason = "is neither a directory here nor a model on the hub. Check the spelling, or log in if it is private."
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}. Check --revision."
    except LocalEntryNotFoundError:
        reason = "is not in the local cache and the hub cannot be reached. Go online once, or give a directory."
    except HFValidationError:
        reason = "is neither a directory here nor a possible hub name (owner/name). Check the spelling."
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"cannot be downloaded ({type(error).__name__}: {error}). Check the network and the free disk space."
    raise ModelError(f"The model {model!r} {reason}")

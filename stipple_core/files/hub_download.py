"""Download of model files from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def download(name: str, files: list[str], what: str, fix: str) -> Path:
    """Return a folder with the files of a hub model that match the patterns `files`; huggingface_hub caches it.

    Args:
        what: What the model is, for the error message: "text encoder".
        fix: What to do without a network, for the error message.

    Raises:
        FileNotFoundError: In one line, if the hub does not provide the files.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, unknown, gated or malformed names: each has its own class
        raise FileNotFoundError(
            f"{what} {name!r} is not a folder and can't be downloaded from the Hugging Face hub "
            f"({type(error).__name__}); on a machine with a network run {fix}"
        ) from None
